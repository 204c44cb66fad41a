"""Training from the cells of a notebook, in a real kernel."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import RunCrepa
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbclient.util import ensure_async

from crepa_cli.report.metrics import read_metrics

CREPA = f"!{sys.executable} -m crepa_cli"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, not the machine that runs the tests, has to be recognised."""
    monkeypatch.delenv("CI", raising=False)


def notebook(folder: Path, *cells: str) -> NotebookClient:
    """A notebook in a folder, with a time limit for each cell."""
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return NotebookClient(content, timeout=120, resources={"metadata": {"path": str(folder)}})


@pytest.mark.slow
def test_commands_in_a_cell_write_plain_text_and_ask_nothing(demo: Path, tmp_path: Path) -> None:
    client = notebook(
        demo,
        f"{CREPA} train --profile t2v --model wan --demo --steps 5 --output {tmp_path / 'run'}",
        f"%cd -q {tmp_path}",
        f"{CREPA} init --model wan",
    )
    client.execute()
    trained, _, written = ("".join(output.text for output in cell.outputs) for cell in client.nb.cells)
    assert "weights written" in trained
    assert len(trained.encode()) < 6000
    assert "\x1b" not in trained + written
    assert (tmp_path / "crepa.toml").exists()


@pytest.mark.slow
def test_an_interrupted_cell_leaves_a_checkpoint_to_resume_from(
    demo: Path, tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    client = notebook(
        demo,
        f"""
        from crepa_cli import api
        sets = ["validation.every=0", "checkpoints.every=0", "train.steps=5000"]
        profile = api.resolve("t2v", {{"model.family": "wan"}}, sets, demo=True).profile
        api.train(profile, output={str(run)!r})
        """,
    )

    async def interrupt_while_training() -> None:
        cell = asyncio.ensure_future(client.async_execute())
        while not cell.done() and len(read_metrics(run / "metrics.jsonl")) < 2:
            await asyncio.sleep(0.05)
        assert client.km is not None
        await ensure_async(client.km.interrupt_kernel())
        with pytest.raises(CellExecutionError, match="stopped by SIGINT"):
            await cell

    asyncio.run(interrupt_while_training())
    done = len(read_metrics(run / "metrics.jsonl"))
    assert 2 <= done < 5000
    monkeypatch.chdir(demo)
    assert run_crepa("train", "--resume", "--output", run, "--steps", done + 2) == 0
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(done + 2))
