"""The command line as users see it: help without torch, and mistakes that exit with code 2 and one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OpenTiny, RunCrepa

DEMO = ["train", "--profile", "t2v", "--model", "wan", "--demo", "--plain"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["init", "--list"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from crepa_cli.cli import main\n"
        f"sys.argv = ['crepa', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit as exit_:\n    assert not exit_.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'peft', 'av'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA's allocator has these segments on Linux alone")
@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, None),
    ],
)
def test_segments_grow_unless_the_user_configured_the_allocator(
    configured: dict[str, str], expected: str | None, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    for name, value in configured.items():
        monkeypatch.setenv(name, value)
    assert run_crepa("init", "--list") == 0
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def refused(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must exit with code 2."""
    assert run_crepa(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.count("error:") == 1
    return message


def test_no_clips_configured(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(run_crepa, capsys, "train", "--profile", "t2v", "--model", "wan")
    assert "--data DIR" in message


def test_a_folder_of_unreadable_clips(
    run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], open_tiny: OpenTiny, tiny_dinov2: Path
) -> None:
    Path("clips").mkdir()
    for name in ("a", "b"):
        Path("clips", f"{name}.mp4").write_bytes(b"no video")
        Path("clips", f"{name}.txt").write_text("a caption")
    checkpoint = open_tiny("wan", "t2v").base.name
    flags = ["--checkpoint", checkpoint, "--data", "clips", "--plain", "--set", f"crepa.encoder={tiny_dinov2}"]
    assert run_crepa("train", "--profile", "t2v", "--model", "wan", *flags) == 2
    captured = capsys.readouterr()
    assert "skipped a.mp4" in captured.out
    assert "skipped b.mp4" in captured.out
    assert captured.err.startswith("error: no usable clips in clips")


def test_a_typo_in_a_toml_key(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    Path("crepa.toml").write_text("[crepa]\nlamda = 0.3\n")
    message = refused(run_crepa, capsys, "train", "--model", "wan")
    assert "crepa.toml" in message
    assert "crepa.lamda" in message
    assert "crepa.lambda" in message


def test_a_block_past_the_last_one(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(run_crepa, capsys, *DEMO, "--set", "crepa.block_index=99")
    assert "crepa.block_index = 99" in message
    assert "10 blocks" in message
    assert "0 to 9" in message


def test_a_teacher_block_past_the_last_one(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = ["--set", "crepa.use_backbone_features=true", "--set", "crepa.teacher_block_index=12"]
    message = refused(run_crepa, capsys, *DEMO, *backbone, "--set", "data.width=100")
    assert "crepa.teacher_block_index = 12" in message
    assert "data.width = 100" in message
    assert "96 or 112" in message


@pytest.mark.parametrize("family", ["flux", "wan2"])
def test_a_family_without_support(family: str, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(run_crepa, capsys, "train", "--profile", "t2v", "--model", family)
    assert family in message
    assert all(supported in message for supported in ("wan", "ltxvideo", "sanavideo", "kandinsky5_video", "ltx2"))


def test_a_checkpoint_of_another_family(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other/transformer").mkdir(parents=True)
    Path("other/model_index.json").write_text("{}")
    Path("other/transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    Path("clips").mkdir()
    message = refused(run_crepa, capsys, "train", "--model", "wan", "--checkpoint", "other", "--data", "clips")
    assert "FluxTransformer2DModel" in message


def test_a_checkpoint_that_is_nowhere(
    run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("clip.mp4").touch()
    message = refused(run_crepa, capsys, "train", "--model", "wan", "--data", ".")
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in message
    assert "local folder" in message


def test_a_folder_that_holds_a_run(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/profile.toml").touch()
    assert "--resume" in refused(run_crepa, capsys, *DEMO, "--output", "run")


def test_nothing_to_resume(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to resume" in refused(run_crepa, capsys, "train", "--resume")


def test_print_profile_cuts_no_value(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red disc drifts over blue stripes " * 20
    flags = ["--profile", "i2v", "--model", "wan", "--set", f"validation.prompts=[{prompt!r}]"]
    assert run_crepa("train", *flags, "--print-profile") == 0
    printed = capsys.readouterr().out
    assert f'["{prompt}"]' in printed
    assert '"Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"' in printed


def test_wrong_values_do_not_hide_what_is_wrong_with_checkpoint_clips_and_packages(
    run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["train", "--model", "wan", "--data", "nowhere", "--set", "crepa.scheduler=cosin", "--steps", 0]
    sets = ["crepa.block_index=99", "data.frames=16", "report.trackers=dvclive"]
    message = refused(run_crepa, capsys, *flags, *(word for one in sets for word in ("--set", one)))
    for part in ("crepa.scheduler", "train.steps", "nowhere does not exist", "crepa.block_index = 99", "dvclive"):
        assert part in message
    assert "data.frames = 16: wan takes one frame more than a multiple of 4, such as 13 or 17" in message
    assert message.startswith("error: 6 mistakes in the settings:\n")
    assert len(message.splitlines()) == 7


def test_an_empty_folder_of_clips_is_named_beside_a_missing_checkpoint(
    run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(run_crepa, capsys, "train", "--model", "wan", "--checkpoint", "nobody/nothing", "--data", ".")
    assert "No clips in ." in message
    assert "nobody/nothing" in message


def test_print_profile_says_where_values_come_from(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--profile", "t2v", "--model", "wan", "--steps", 7, "--set", "crepa.lambda=0.3"]
    assert run_crepa("train", *flags, "--print-profile") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "family wan" in lines["crepa.block_index"]
    assert "preset t2v" in lines["crepa.scheduler"]
    assert "--steps" in lines["train.steps"]
    assert "--set" in lines["crepa.lambda"]
    assert "built-in default" in lines["crepa.adjacent_tau"]
