"""The training loop in the documentation works as described."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crepa_cli.alignment import Crepa, TokenGrid

NETWORK = 'snapshot_download("facebook/dinov2-base")'
PAGE = (Path(__file__).parents[1] / "docs/own-loop.md").read_text(encoding="utf-8")


def test_the_training_loop_of_fifteen_lines_aligns_a_block() -> None:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "Crepa(" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    torch.manual_seed(0)
    frames, rows, columns, hidden_size, feature_size = 3, 4, 6, 16, 12
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU()) for _ in range(10))
    tokens = torch.randn(2, frames * rows * columns, hidden_size)
    features = torch.randn(1, 1, 37 * 37, feature_size).expand(2, frames, -1, -1)

    def diffusion_loss(model: nn.ModuleList, batch: dict[str, Tensor]) -> Tensor:
        states = batch["tokens"]
        for block in model:
            states = states + block(states)
        return (states - batch["tokens"]).square().mean()

    similarities: list[float] = []
    names = {
        "blocks": blocks,
        "model": blocks,
        "optimizer": torch.optim.AdamW(blocks.parameters(), lr=1e-2),
        "batches": [{"tokens": tokens, "features": features}] * 30,
        "diffusion_loss": diffusion_loss,
        "frames": frames,
        "rows": rows,
        "columns": columns,
        "hidden_size": hidden_size,
        "feature_size": feature_size,
        "similarities": similarities,
    }
    watched = code.rstrip() + "\n    similarities.append(alignment.similarity.item())\n"
    exec(compile(watched, "own-loop.md", "exec"), names)
    assert similarities[-1] - similarities[0] > 0.2


def test_the_features_have_the_shape_that_the_training_loop_takes(tiny_dinov2: Path) -> None:
    """A tiny encoder on the CPU stands in for the published one."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if NETWORK in block]
    code = code.replace(NETWORK, repr(str(tiny_dinov2))).replace('"cuda"', '"cpu"')
    video = torch.randint(0, 256, (9, 3, 28, 42), dtype=torch.uint8)
    names: dict[str, Any] = {"video": video, "frames": 3, "batch": {}}
    exec(compile(code, "own-loop.md", "exec"), names)
    features = names["batch"]["features"]
    hidden = torch.randn(1, 3, 24, 16)
    grids = TokenGrid(3, 4, 6), TokenGrid(3, 37, 37)
    assert Crepa(16, features.shape[-1])(hidden, features, *grids).loss.isfinite()
