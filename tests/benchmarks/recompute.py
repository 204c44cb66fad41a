"""FLOPs and memory of a step by what is recomputed: `python tests/benchmarks/recompute.py [figures.json]`.

Published models at their default sizes, a LoRA of rank 32, on fake tensors: it needs neither weights nor a GPU, and
takes a few minutes. FLOPs are those of the transformer alone, memory is that of a step with an encoder as the teacher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from crepa_cli.memory.depth import with_blocks
from crepa_cli.memory.shapes import clips_of, form_bucket
from crepa_cli.memory.step import fake_autocast, fake_batch, fake_training, predict_training
from crepa_cli.models import load_family
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile

MODELS = [
    ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    ("ltxvideo", "Lightricks/LTX-Video"),
    ("sanavideo", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"),
    ("kandinsky5_video", "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"),
    ("kandinsky6", "kandinskylab/Kandinsky-6.0-Lite-5s-Diffusers"),
    ("cogvideox", "zai-org/CogVideoX-5b"),
    ("ltx2", "Lightricks/LTX-2"),
    ("hunyuanvideo15", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"),
    ("hunyuanvideo", "hunyuanvideo-community/HunyuanVideo"),
]
WAYS: dict[str, dict[str, object]] = {
    "blocks": {},
    "blocks and their parts (finer_recompute)": {"finer_recompute": True},
    "all but self-attention (keep = attention)": {"keep": "attention"},
    "nothing (keep = all)": {"keep": "all"},
}
ON_HOST: dict[str, object] = {"stream_weights": True, "offload_activations": True}
GPU = torch.device("cuda")


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of fused attention on the CPU, which torch's counter does not know."""
    return int(sdpa_flop_count(query, key, value))


def attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of its backward."""
    return int(sdpa_backward_flop_count(gradient, query, key, value))


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def settings(family: Family, memory: dict[str, object]) -> Profile:
    """The published size of the clips, in bfloat16."""
    published = family.published.get(family.base.name, {})
    defaults = {table: {**family.settings[table], **published.get(table, {})} for table in ("data", "crepa")}
    return Profile.model_validate(
        {
            "model": {"family": family.name, "checkpoint": family.base.name},
            "memory": memory,
            "adapter": {**family.settings["adapter"], "rank": 32, "alpha": 32.0},
            "train": {"learning_rate": 1e-4},
            "validation": {"every": 0, "guidance_scale": 5.0},
            **defaults,
        }
    )


def step_flops(family: Family, profile: Profile) -> float:
    """FLOPs of the forward and backward pass of a step, extended from those of two and of three blocks of each kind."""
    starts = list(accumulate(family.depths[:-1], initial=0))
    two = [start + block for start in starts for block in range(2)]
    flops = shallow_flops(*with_blocks(profile, family, two))
    more = [shallow_flops(*with_blocks(profile, family, sorted([*two, start + 2]))) for start in starts]
    return flops + sum((depth - 2) * (one - flops) for depth, one in zip(family.depths, more, strict=True))


def shallow_flops(profile: Profile, family: Family) -> int:
    """The same of a transformer of few blocks."""
    off = profile.model_copy(update={"crepa": profile.crepa.model_copy(update={"enabled": False})})
    clips = clips_of(profile, family, form_bucket(profile, family))
    batch = {name: tensor[None] for name, tensor in clips.tensors.items()}
    with fake_training(off, family, clips.feature_size, GPU) as training:
        tensors = fake_batch(batch)
        noise = torch.empty(tensors["latents"].shape)
        inputs = family.step(tensors, noise, torch.full((1,), 0.5)).inputs
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            with fake_autocast(profile):
                prediction = training.model.transformer(**inputs).sample
            prediction.sum().backward()
    return int(counter.get_total_flops())


def figures() -> Iterator[dict[str, Any]]:
    """One row for each model and way to recompute."""
    for name, checkpoint in MODELS:
        family = load_family(name)(checkpoint, "t2v")
        whole = None
        for way, memory in WAYS.items():
            profile = settings(family, memory)
            clips, flops = clips_of(profile, family, form_bucket(profile, family)), step_flops(family, profile)
            whole = whole or flops
            others = [memory] if "keep" in memory else [memory, memory | ON_HOST]
            peaks = [sum(predict_training(settings(family, one), family, clips, GPU).values()) / 1e9 for one in others]
            yield {
                "model": checkpoint.split("/")[1],
                "recomputed": way,
                "TFLOP": flops / 1e12,
                "relative": flops / whole,
                "peak GB": peaks[0],
                "streamed and offloaded GB": peaks[1] if len(peaks) > 1 else None,
            }


def main() -> None:
    """Measure and print; write the figures as JSON if a file is named."""
    rows = list(figures())
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
