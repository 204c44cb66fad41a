"""The kernel of self-attention: its choice, and that no mask keeps the fast ones from running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny, RunCrepa
from test_placement import Training, clips_of, of_depth, result, settings
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crepa_cli.models import FAMILIES
from crepa_cli.models.attention import Attention, described, fastest
from crepa_cli.runs.capabilities import kernel_mistakes
from crepa_cli.runs.resume import resume_mistakes

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class SeenAttention(TorchFunctionMode):
    """Records the masks with which `scaled_dot_product_attention` compares that many tokens with each other."""

    def __init__(self, *tokens: int) -> None:
        super().__init__()
        self.tokens, self.masks = tokens, list[Tensor | None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"].shape[-2] == given["key"].shape[-2] in self.tokens:
                self.masks.append(given["attn_mask"])
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_mask_reaches_self_attention(name: str, open_tiny: OpenTiny) -> None:
    family = of_depth(open_tiny(name, "t2v"), 3)
    off: dict[str, object] = {"activation_checkpointing": False, "gradient_accumulation": 1}
    profile = settings(family, {"train": off})
    training = Training(family, profile, clips_of(family, profile))
    grid = family.token_grid(training.clips.tensors["latents"][None])
    captions = (training.clips.tensors.get(name, ()) for name in ("prompt_embeds", "prompt_embeds_2"))
    video, text = grid.frames * grid.tokens, sum(map(len, captions))
    # Some attend to the clip and its caption at once.
    with SeenAttention(video, video + text) as seen:
        training.step()
    assert seen.masks == ([None] * family.block_count if family.attention_heads else [])


def test_a_chosen_kernel_computes_self_attention_alone(open_tiny: OpenTiny) -> None:
    """On the CPU torch has one fused kernel, which is its own choice too."""
    family = of_depth(open_tiny("ltxvideo", "t2v"), 3)
    profile = settings(family, {"train": {"attention": "flash"}})
    blocks = family.blocks(Training(family, profile, clips_of(family, profile)).learner.aligned.transformer)
    parts: list[Any] = [block.get_submodule(name) for name in ("attn1", "attn2") for block in blocks]
    assert [part.processor._attention_backend for part in parts] == ["_native_flash"] * 3 + [None] * 3
    (losses, weights), (found_losses, found) = (
        result(family, {"train": {"attention": kernel}}, steps=2) for kernel in ("native", "flash")
    )
    assert found_losses == losses
    assert all(torch.equal(found[name], one) for name, one in weights.items())


def test_kernels_that_do_not_run_are_refused(open_tiny: OpenTiny) -> None:
    def mistakes(name: str, kernel: str) -> list[str]:
        family = open_tiny(name, "t2v")
        return kernel_mistakes(settings(family, {"train": {"attention": kernel}}), family, CPU)

    for name in FAMILIES:
        assert not mistakes(name, "auto")
        assert not mistakes(name, "native")
    (message,) = mistakes("wan", "cudnn")
    assert message.startswith("train.attention = 'cudnn': ")
    assert message.endswith("on this CPU; leave it out, or choose one of: native, flash")
    (message,) = mistakes("sanavideo", "flash")
    assert "leave it out" in message


def test_times_are_measured_once(open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention = Attention.of(open_tiny("wan", "t2v"), torch.bfloat16, clips=2, tokens=30)
    times = attention.times(CPU)
    assert set(times) == {"native", "flash"}
    assert attention.times(CPU) == times
    assert len(list(tmp_path.rglob("*.json"))) == 1
    Attention.of(open_tiny("wan", "t2v"), torch.bfloat16, clips=2, tokens=31).times(CPU)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_another_kernel_must_be_clearly_faster() -> None:
    assert fastest({}) == "native"
    assert fastest({"native": 100, "cudnn": 98}) == "native"
    assert fastest({"native": 100, "cudnn": 90, "flash": 95}) == "cudnn"
    assert "'cudnn'" in described({"native": 5_000_000, "cudnn": 3_000_000})
    assert described({"native": 5_000_000, "cudnn": 3_000_000}).endswith("cudnn 3.0 ms, native 5.0 ms")


def test_a_resumed_run_may_change_the_kernel(open_tiny: OpenTiny) -> None:
    family = open_tiny("wan", "t2v")
    before, after = (settings(family, {"train": {"attention": kernel}}) for kernel in ("auto", "flash"))
    assert resume_mistakes(before, after) == []


@pytest.mark.slow
def test_a_run_with_a_kernel_that_does_not_run_ends_with_one_message(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    flags = "--plain", "--set", "train.attention=cudnn", "--output", demo / "runs/cudnn"
    assert run_crepa("train", "--profile", "t2v", "--model", "wan", "--demo", *flags) == 2
    assert capsys.readouterr().err.count("train.attention = 'cudnn'") == 1
    assert not (demo / "runs/cudnn").exists()
