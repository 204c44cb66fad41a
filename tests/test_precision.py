"""Layers that stay in float32 under autocast, against the published module, which runs without autocast."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny
from test_families import batch_of, encoded_clip
from torch import Tensor, nn

from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family
from crepa_cli.profile import AdapterSettings
from crepa_cli.training.adapter import lora_layers, make_trainable

IN_FLOAT32 = {"timestep", "video_coords"}
"""Inputs that the pipelines leave in float32."""
IN_BFLOAT16 = {"hunyuanvideo15": {"timestep"}}
"""Those that the pipelines of a family do not leave so."""
OUR_OWN = {"text_lengths"}
"""Inputs that only our transformers take."""


def training_inputs(family: Family) -> dict[str, Any]:
    """The transformer's inputs for a clip, with everything that encoders make of caption and image in bfloat16."""
    torch.manual_seed(0)
    side = 2 * family.size_multiple
    _, tensors = encoded_clip(family, 2 * family.frame_multiple + 1, side, side)
    embeds = {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith("_embeds")}
    batch = batch_of(tensors | embeds, 1)
    return dict(family.step(batch, torch.randn_like(batch["latents"]), torch.full((1,), 0.5)).inputs)


def published(family: Family) -> nn.Module:
    """The module as diffusers loads it for its pipelines."""
    transformer_class = getattr(diffusers, family.transformer_class)
    loaded: nn.Module = transformer_class.from_pretrained(
        family.base.name, subfolder="transformer", dtype=torch.bfloat16
    )
    return loaded.eval()


def in_bfloat16(family: Family, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as a pipeline gives them."""
    in_float32 = IN_FLOAT32 - IN_BFLOAT16.get(family.name, set())

    def cast(name: str, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and name not in in_float32
        return value.bfloat16() if floating else value

    return {name: cast(name, value) for name, value in inputs.items() if name not in OUR_OWN}


# The norms of queries and keys have weights in bfloat16 and get float32, in the published module as in training.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_under_autocast_a_transformer_computes_what_the_published_one_does(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    inputs = training_inputs(family)
    expected = published(family)(**in_bfloat16(family, inputs)).sample
    transformer = family.load_transformer(torch.bfloat16).eval()
    with torch.autocast("cpu", torch.bfloat16):
        predicted = transformer(**inputs).sample
    torch.testing.assert_close(predicted, expected, rtol=0, atol=0)


def with_lora(family: Family) -> nn.Module:
    """The transformer in training, with a LoRA that has an effect."""
    torch.manual_seed(0)
    transformer = family.load_transformer(torch.bfloat16)
    settings = {**family.settings["adapter"], "rank": 4, "alpha": 4.0, "export": ["diffusers"]}
    make_trainable(transformer, AdapterSettings.model_validate(settings))
    for layer in lora_layers(transformer).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    module: nn.Module = transformer.train()
    return module


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_of_a_lora_are_not_copied_to_float32_and_nothing_changes(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    inputs = training_inputs(family)
    transformer = with_lora(family)
    peaks, gradients = [], []
    for copied in (False, True):
        for layer in lora_layers(transformer).values():
            layer.cast_input_dtype_enabled |= copied
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            loss = transformer(**inputs).sample.float().square().mean()
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        peaks.append(live.peak)
    assert peaks[0] < peaks[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize("name", ["wan", "sanavideo"])
def test_compiled_and_recomputed_blocks_keep_their_precision_with_a_lora(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    inputs = training_inputs(family)
    noisy = inputs["hidden_states"].requires_grad_()
    expected = published(family)(**in_bfloat16(family, inputs)).sample.float()
    (gradient,) = torch.autograd.grad(expected.square().sum(), noisy)

    transformer = family.load_transformer(torch.bfloat16)
    settings = {**family.settings["adapter"], "rank": 4, "alpha": 4.0, "export": ["diffusers"]}
    make_trainable(transformer, AdapterSettings.model_validate(settings))
    transformer.train().enable_gradient_checkpointing()
    for block in family.blocks(transformer)[:2]:
        block.forward = torch.compile(block.forward, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        predicted = transformer(**inputs).sample.float()
    torch.testing.assert_close(predicted, expected, rtol=0, atol=0)
    (computed,) = torch.autograd.grad(predicted.square().sum(), noisy)
    torch.testing.assert_close(computed, gradient, rtol=0, atol=0)
