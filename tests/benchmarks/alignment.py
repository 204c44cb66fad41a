"""Measures the cost of alignment: `python tests/benchmarks/alignment.py [costs.json]`.

One table for each question, and all figures as JSON. Wall times are ratios of runs taken in turn, so that they hold on
a busy machine. The mid-size step runs on the CPU and takes some minutes.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    Kandinsky5Transformer3DModel,
    LTXVideoTransformer3DModel,
    ModelMixin,
    SanaVideoTransformer3DModel,
    WanTransformer3DModel,
)
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from crepa_cli.alignment import Crepa, TokenGrid
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.demo import write_tiny
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.models import load_family
from crepa_cli.models.wan import Wan
from crepa_cli.profile import CrepaSettings
from crepa_cli.training.aligned import AlignedTransformer, BlockPair

ENCODER = TokenGrid(frames=1, rows=37, columns=37)
ENCODER_WIDTH = 1536
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "relation": {"objective": "relation"},
    "conv": {"projector": "conv"},
    "spatial norm": {"spatial_norm": 0.6},
    "relation, conv": {"objective": "relation", "projector": "conv"},
}
"""Arguments of `Crepa`."""


class Case(NamedTuple):
    """A published transformer and the inputs of one clip, both on the meta device."""

    family: str
    make: Callable[[], ModelMixin]
    inputs: dict[str, Any]
    grid: TokenGrid
    width: int


def published_cases() -> dict[str, Case]:
    """The published configurations at their default sizes; to be made on the meta device."""
    ltx, kandinsky = TokenGrid(16, 16, 24), TokenGrid(31, 32, 48)
    return {
        "Wan 2.1 1.3B, 832x480x81": Case(
            "wan",
            lambda: WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
            {
                "hidden_states": torch.empty(1, 16, 21, 60, 104),
                "timestep": torch.empty(1),
                "encoder_hidden_states": torch.empty(1, 512, 4096),
            },
            TokenGrid(21, 30, 52),
            1536,
        ),
        "LTX-Video 2B, 768x512x121": Case(
            "ltxvideo",
            LTXVideoTransformer3DModel,
            {
                "hidden_states": torch.empty(1, ltx.frames * ltx.tokens, 128),
                "timestep": torch.empty(1),
                "encoder_hidden_states": torch.empty(1, 128, 4096),
                "encoder_attention_mask": torch.empty(1, 128),
                "num_frames": ltx.frames,
                "height": ltx.rows,
                "width": ltx.columns,
            },
            ltx,
            2048,
        ),
        "SANA-Video 2B, 832x480x81": Case(
            "sanavideo",
            SanaVideoTransformer3DModel,
            {
                "hidden_states": torch.empty(1, 16, 21, 60, 104),
                "timestep": torch.empty(1),
                "encoder_hidden_states": torch.empty(1, 300, 2304),
            },
            TokenGrid(21, 30, 52),
            2240,
        ),
        "Kandinsky 5 Lite, 768x512x121": Case(
            "kandinsky5_video",
            lambda: Kandinsky5Transformer3DModel(
                in_visual_dim=16, out_visual_dim=16, model_dim=1792, ff_dim=7168, visual_cond=True
            ),
            {
                "hidden_states": torch.empty(1, 31, 64, 96, 33),
                "timestep": torch.empty(1),
                "encoder_hidden_states": torch.empty(1, 256, 3584),
                "pooled_projections": torch.empty(1, 768),
                "visual_rope_pos": [torch.arange(n) for n in (kandinsky.frames, kandinsky.rows, kandinsky.columns)],
                "text_rope_pos": torch.arange(256),
            },
            kandinsky,
            1792,
        ),
    }


def count_flops() -> list[dict[str, Any]]:
    """FLOPs of a forward and backward pass without alignment, and with each kind relative to it, on meta tensors.

    The transformer trains a LoRA: its step is cheaper than that of full tuning, so the ratio is the larger one. The
    gradient passes through all blocks either way.
    """
    rows = []
    with torch.device("meta"):
        cases = published_cases()
    for name, case in cases.items():
        bare = step_flops(case)
        ratios = {option: 1 + alignment_flops(case, arguments) / bare for option, arguments in OPTIONS.items()}
        rows.append({"model": name, "tflop": bare / 1e12, **ratios})
    return rows


def step_flops(case: Case) -> int:
    """FLOPs of a step without alignment."""
    family = load_family(case.family)
    with torch.device("meta"):
        transformer = case.make().requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=32, target_modules=family.settings["adapter"]["target_modules"]))
    with FlopCounterMode(display=False) as counter:
        transformer(**case.inputs).sample.sum().backward()
    return int(counter.get_total_flops())


def alignment_flops(case: Case, arguments: dict[str, Any]) -> int:
    """FLOPs of the alignment in a step: the loss and its backward down to the hidden states."""
    teacher = TokenGrid(case.grid.frames, ENCODER.rows, ENCODER.columns)
    with torch.device("meta"):
        crepa = Crepa(case.width, ENCODER_WIDTH, **arguments)
        hidden = torch.empty(1, case.grid.frames, case.grid.tokens, case.width, requires_grad=True)
        features = torch.empty(1, teacher.frames, teacher.tokens, ENCODER_WIDTH, dtype=torch.float16)
    with FlopCounterMode(display=False) as counter:
        crepa(hidden, features, case.grid, teacher).loss.backward()
    return int(counter.get_total_flops())


def time_loss() -> list[dict[str, Any]]:
    """Time and peak extra memory of the loss and its backward, by distance and clip length."""
    cases = [(21, distance) for distance in (0, 1, 2, 4, 8)] + [(41, 1), (81, 1)]
    steps = {case: _loss_step(*case) for case in cases}
    times = in_turns(steps, rounds=5)
    rows = []
    for case in cases:
        with LiveBytes() as memory:
            outputs = steps[case]()
        extra = memory.peak - sum(tensor.nbytes for tensor in outputs)
        rows.append(
            {"frames": case[0], "distance": case[1], "seconds": statistics.median(times[case]), "extra_bytes": extra}
        )
    return rows


def _loss_step(frames: int, distance: int) -> Callable[[], list[Tensor]]:
    student, teacher = TokenGrid(frames, 30, 52), TokenGrid(frames, ENCODER.rows, ENCODER.columns)
    crepa = Crepa(512, 384, adjacent_distance=distance, cumulative_neighbors=True)
    hidden = torch.randn(1, frames, student.tokens, 512).bfloat16().requires_grad_()
    features = torch.randn(1, frames, teacher.tokens, 384).half()

    def step() -> list[Tensor]:
        hidden.grad = None
        crepa.zero_grad()
        crepa(hidden, features, student, teacher).loss.backward()
        return [tensor.grad for tensor in (hidden, *crepa.parameters()) if tensor.grad is not None]

    return step


def time_steps() -> list[dict[str, Any]]:
    """Wall time of a step of a transformer of 50M parameters on 2,016 tokens, with and without alignment.

    "without cache" decodes the clip and encodes its frames with a DINOv2 ViT-S in every step.
    """
    grid, teacher = TokenGrid(21, 8, 12), TokenGrid(21, ENCODER.rows, ENCODER.columns)
    torch.manual_seed(0)
    features = torch.randn(1, teacher.frames, teacher.tokens, ENCODER_WIDTH).half()
    with tempfile.TemporaryDirectory() as folder, online_teacher(Path(folder)) as online:
        latents = torch.randn(1, 4, 21, 16, 24)

        def step(model: AlignedTransformer, given: Callable[[], tuple[Tensor, TokenGrid] | tuple[()]]) -> None:
            inputs = {
                "hidden_states": latents.repeat(1, 4, 1, 1, 1),
                "timestep": torch.tensor([500.0]),
                "encoder_hidden_states": torch.zeros(1, 64, 256),
            }
            output = model(inputs, grid, *given())
            loss = output.prediction.square().mean()
            (loss + 0.5 * output.alignment.loss if output.alignment else loss).backward()
            model.zero_grad()

        cut_off = mid_size_model(ENCODER_WIDTH)
        cut_off.drop_alignment()
        models = {"off": mid_size_model(None), "on": mid_size_model(ENCODER_WIDTH), "after the cutoff": cut_off}
        steps: dict[str, Callable[[], Any]] = {
            "off": lambda: step(models["off"], lambda: ()),
            "on": lambda: step(models["on"], lambda: (features, teacher)),
            "after the cutoff": lambda: step(models["after the cutoff"], lambda: ()),
        }
        times = in_turns(steps, rounds=5)
        small = mid_size_model(384)
        online_step = {"without cache": lambda: step(small, lambda: online.features(latents)), "off": steps["off"]}
        slow = in_turns(online_step, rounds=1)
    ratios = {name: [a / b for a, b in zip(times[name], times["off"], strict=True)] for name in times}
    times["without cache"], ratios["without cache"] = slow["without cache"], [slow["without cache"][0] / slow["off"][0]]
    return [
        {"alignment": name, "seconds": statistics.median(times[name]), "ratio": statistics.median(ratios[name])}
        for name in times
    ]


def mid_size_model(feature_size: int | None) -> AlignedTransformer:
    """A Wan transformer of about 50M parameters."""
    transformer = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=12, text_dim=256, freq_dim=256
    )
    return AlignedTransformer(
        transformer,
        Crepa(512, feature_size) if feature_size else None,
        blocks=transformer.blocks,
        pair=BlockPair(8),
        row_major=lambda hidden, grid: hidden.view(len(hidden), grid.frames, grid.tokens, -1),
    )


@contextlib.contextmanager
def online_teacher(folder: Path) -> Iterator[OnlineTeacher]:
    """A tiny VAE and a DINOv2 ViT-S with random weights, as used with `teacher_cache = false`."""
    write_tiny("wan", folder / "wan", "t2v")
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    Dinov2Model(config).save_pretrained(folder / "dinov2")
    settings = CrepaSettings(block_index=8, encoder=str(folder / "dinov2"), teacher_cache=False)
    yield OnlineTeacher(Wan(str(folder / "wan"), "t2v"), settings, torch.device("cpu"))


def in_turns(steps: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each step, after an uncounted warmup; the steps take turns, round by round."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print rows as a table."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    """Measure and print; write the figures as JSON if a file is named."""
    console = Console()
    questions = {
        "FLOPs of a step, and with alignment relative to it": count_flops,
        "The loss and its backward": time_loss,
        "A mid-size step on the CPU": time_steps,
    }
    results = {}
    for title, measure in questions.items():
        results[title] = measure()
        show(title, results[title], console)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"torch": torch.__version__, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
