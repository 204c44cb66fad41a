"""Blocks are compiled one by one, with alignment on: without breaks, and once for each shape of the clips."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import OpenTiny
from test_placement import Tables, Training, clips_of, of_depth, settings
from torch._dynamo.utils import counters

from crepa_cli.models import FAMILIES

CASES: list[tuple[str, dict[str, object]]] = [*((name, {}) for name in FAMILIES), ("ltxvideo", {"attention": "flash"})]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
# Dynamo looks at .grad of every input of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("name", "train"), CASES)
def test_blocks_compile_without_breaks_and_once_for_each_shape(
    name: str, train: dict[str, object], open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are those of any backend; inductor takes a minute for them.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    family = of_depth(open_tiny(name, "t2v"), 3)
    tables: Tables = {"train": {"compile": True, "gradient_accumulation": 1, **train}, "adapter": {"dropout": 0.0}}
    profile = settings(family, tables)
    training = Training(family, profile, clips_of(family, profile))
    graphs = []
    for side in (64, 128, 64, 128, 96):
        training.clips = clips_of(family, profile, side)
        training.step()
        graphs.append(counters["stats"]["unique_graphs"])
    # Kandinsky's attention to captions stays outside: it would be compiled for every length of a caption.
    outside = name == "kandinsky5_video"
    assert [("CaptionAttention" in reason) for reason in counters["graph_break"]] == [True] * outside
    # The first block has a graph of its own, as its input needs no gradient.
    assert 1 <= graphs[0] <= 1 + len(family.depths) + outside
    assert graphs[1] <= 2 * graphs[0]
    assert graphs[2:4] == [graphs[1]] * 2
    assert graphs[4] <= 3 * graphs[0]
