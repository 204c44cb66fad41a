"""The README's code works as described."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_training_loop_of_fifteen_lines_aligns_a_block() -> None:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Crepa(" in block]
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
    exec(compile(watched, "README.md", "exec"), names)
    assert similarities[-1] - similarities[0] > 0.2
