"""Operations, casts and blocking copies of a step, by torch's profiler: `python tests/benchmarks/launches.py [FILE]`.

Tiny models with a LoRA, CREPA and a moving average in bfloat16, recomputation included: what is launched does not
depend on sizes. Each row turns one saving off. The figures are written as JSON to FILE if it is named.

Operations are those that launch a kernel or copy. A cast is a copy to another dtype. A blocking copy is a tensor made
of Python numbers, or a number read from a tensor: each makes the CPU wait for a GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from gpu import Bench
from rich.console import Console
from rich.table import Table
from steps import open_trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from crepa_cli.alignment.resampling import Constants
from crepa_cli.demo import write_tiny
from crepa_cli.demo.teacher import write_tiny_dinov2
from crepa_cli.events import StepDone
from crepa_cli.models import FAMILIES
from crepa_cli.requests import Requests
from crepa_cli.training.adapter import lora_layers
from crepa_cli.training.trainer import Trainer

SETTINGS = {"train": {"ema": 0.99}, "data": {"caption_dropout": 0.0}}
VIEWS = (
    "view",
    "reshape",
    "expand",
    "permute",
    "transpose",
    "slice",
    "select",
    "squeeze",
    "as_strided",
    "alias",
    "detach",
)
"""Parts of the names of operations that launch nothing."""
FUSED = ("aten::_foreach", "aten::_fused_adam")
"""Operations on many tensors: one launch on a GPU, whatever they do on the CPU."""
Row = dict[str, Any]


@contextmanager
def casting_inputs(trainer: Trainer) -> Iterator[None]:
    """Every LoRA copies its input to float32, as peft does by itself."""
    layers = lora_layers(trainer.experts[""].learner.aligned.transformer).values()
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    yield
    for layer in layers:
        layer.cast_input_dtype_enabled = False


@contextmanager
def copying_positions(_trainer: Trainer) -> Iterator[None]:
    """The index tensors of CREPA are copied in every step."""

    def copied(constants: Constants, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, device=constants.device, dtype=dtype)

    with patch.object(Constants, "_tensor", copied):
        yield


@contextmanager
def averaging_one_by_one(trainer: Trainer) -> Iterator[None]:
    """One weight is averaged after the other."""
    average = trainer.experts[""].learner.average
    assert average is not None
    average.foreach = False
    yield
    average.foreach = True


@contextmanager
def updating_one_by_one(trainer: Trainer) -> Iterator[None]:
    """AdamW updates one weight after the other."""
    fuse(trainer, fused=False)
    yield
    fuse(trainer, fused=True)


WAYS: dict[str, Callable[[Trainer], AbstractContextManager[None]]] = {
    "as it is": lambda _: nullcontext(),
    "inputs of the LoRA cast to float32": casting_inputs,
    "positions copied in every step": copying_positions,
    "weights averaged one by one": averaging_one_by_one,
    "weights updated one by one": updating_one_by_one,
}


def fuse(trainer: Trainer, *, fused: bool) -> None:
    """Update all weights in one kernel, on the CPU too, where the trainer does not."""
    for group in trainer.experts[""].learner.optimizer.param_groups:
        group["fused"], group["foreach"] = fused, False


def counts(name: str, bench: Bench, blocks: int) -> dict[str, Counter[str]]:
    """The counts of a step of a family with this many blocks, by way."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = bench.plan(name, "", SETTINGS, blocks=blocks)
    settings = plan.profile()
    trainer = open_trainer(settings, plan.open_family(settings, bench.device), bench.folder)
    fuse(trainer, fused=True)
    events = trainer._steps(lambda: False, Requests())
    assert isinstance(events, Generator)
    found = {}
    with closing(events):
        steps = (event for event in events if isinstance(event, StepDone))
        next(steps)
        for way, changed in WAYS.items():
            with changed(trainer):
                next(steps)
                with profile(activities=[ProfilerActivity.CPU]) as profiled:
                    next(steps)
            found[way] = _count(profiled.events() or [])
    return found


def _count(events: Any) -> Counter[str]:
    found = Counter({"operations": 0, "casts": 0, "blocking copies": 0})
    for event in events:
        name, within = event.name.removeprefix("aten::"), event.cpu_parent
        while within is not None and not within.name.startswith(FUSED):
            within = within.cpu_parent
        if within is not None or not event.name.startswith("aten::"):
            continue
        found["casts"] += name == "_to_copy"
        found["blocking copies"] += name in ("lift_fresh", "_local_scalar_dense")
        leaf = event.name.startswith(FUSED) or not any(one.name.startswith("aten::") for one in event.cpu_children)
        found["operations"] += leaf and not any(part in name for part in VIEWS)
    return found


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each family and saving that is turned off, and one for each further block."""
    for name in FAMILIES:
        three, four = (counts(name, bench, blocks) for blocks in (3, 4))
        yield from ({"family": name, "step": way, **found} for way, found in three.items())
        for way in ("as it is", "inputs of the LoRA cast to float32"):
            yield {
                "family": name,
                "step": f"{way}: a block",
                **{one: four[way][one] - three[way][one] for one in four[way]},
            }


def main() -> None:
    """Count and print; write the figures as JSON if a file is named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder)
        write_tiny_dinov2(tiny / "dinov2")
        for name in FAMILIES:
            write_tiny(name, tiny / f"{name}-t2v", "t2v")
        found = list(rows(Bench(device, tiny / "runs", tiny)))
    table = Table(*found[0])
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
