"""CogVideoX in all its versions: positions, padding, conditions, and what its settings may not say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny, moving_pattern
from safetensors.torch import load_file, save_file
from test_families import batch_of, encoded_clip, sampled_latents
from test_placement import Training, clips_of, of_depth
from test_placement import settings as placed
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crepa_cli import api
from crepa_cli.data.scan import ClipForm, scan
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.demo.cogvideox import VERSION_1_5, tiny_transformer
from crepa_cli.demo.tiny import write_once
from crepa_cli.errors import UserError
from crepa_cli.events import drained
from crepa_cli.models.cogvideox import CogVideoX
from crepa_cli.runs.checks import open_family

VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "2B": ("t2v", {"use_rotary_positional_embeddings": False}),
    "5B": ("t2v", {}),
    "5B-I2V": ("i2v", {"in_channels": 8, "use_learned_positional_embeddings": True}),
    "1.5": ("t2v", dict(VERSION_1_5)),
    "1.5-I2V": ("i2v", {}),
}
"""The task of each version, and how its transformer differs from the tiny one of that task."""


def open_version(version: str, open_tiny: OpenTiny, checkpoints: Path) -> CogVideoX:
    """A tiny checkpoint of a version."""
    task, changes = VERSIONS[version]
    if not changes:
        return CogVideoX(open_tiny("cogvideox", task).base.name, task)

    def write(folder: Path) -> None:
        shutil.copytree(open_tiny("cogvideox", "t2v").base.name, folder)
        tiny_transformer(**changes).save_pretrained(folder / "transformer")
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        if "patch_embed.pos_embedding" in tensors:  # learned, so not what the code computes
            tensors["patch_embed.pos_embedding"] += 0.1
        save_file(tensors, weights, metadata={"format": "pt"})

    return CogVideoX(str(write_once(checkpoints / f"cogvideox-{version}", write)), task)


def settings(family: CogVideoX, *sets: str) -> Any:
    flags = {"model.family": "cogvideox", "model.checkpoint": family.base.name, "model.task": family.task}
    return api.resolve("t2v", flags, ["validation.every=0", *sets]).profile


@pytest.mark.parametrize("version", VERSIONS)
def test_training_gives_the_transformer_what_the_pipeline_gives_it(
    version: str, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    torch.manual_seed(0)
    family = open_version(version, open_tiny, checkpoints)
    width, height = family.only_size or (64, 96)
    video, tensors = encoded_clip(family, frames=17, height=height, width=width)
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(family.base.name)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    sampled_latents(family, pipeline, video, tensors["latents"], steps=2)

    given, batch = seen[-1], batch_of(tensors, 1)
    level = (given["timestep"] + 0.5) / 1000
    trained = family.step(batch, torch.randn_like(batch["latents"]), level).inputs
    assert trained["hidden_states"].shape == given["hidden_states"].shape
    if family.task == "i2v":
        conditions = (inputs["hidden_states"][:, :, 4:] for inputs in (trained, given))
        # The pipeline takes an image of 8 bits.
        torch.testing.assert_close(*conditions, rtol=0, atol=0.05)
    for name in ("encoder_hidden_states", "timestep", "image_rotary_emb", "ofs"):
        torch.testing.assert_close(trained.get(name), given.get(name))


@pytest.mark.parametrize(("version", "copies"), [("5B", 0), ("1.5", 1)])
def test_one_more_latent_frame_makes_their_number_even_and_is_not_decoded(
    version: str, copies: int, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    family = open_version(version, open_tiny, checkpoints)
    pipeline, video = family.load_vae_pipeline(), moving_pattern(17, 32, 48)
    with torch.no_grad():
        latents = family.encode_clip(pipeline, video)["latents"]
        whole = pipeline.vae.decode(latents[None, :, copies:] / 0.7).sample[0].clamp(-1, 1)
        assert torch.equal(family.decode_latents(pipeline, latents), whole)
    assert latents.shape[1] == 5 + copies
    assert torch.equal(latents[:, :copies], latents[:, copies : 2 * copies])
    assert whole.shape == video.shape


@torch.no_grad()
def test_the_first_frame_has_the_noise_of_the_authors_training(open_tiny: OpenTiny) -> None:
    """Its strength is log-normal: exp of a normal number with mean -3 and standard deviation 0.5."""
    family, video = open_tiny("cogvideox", "i2v"), torch.zeros(3, 9, 32, 32)
    images: list[Tensor] = []
    pipeline: Any = family.load_vae_pipeline()
    encode = pipeline.vae.encode

    def seen(image: Tensor) -> Any:
        images.append(image)
        return encode(image)

    pipeline.vae.encode = seen
    first, again = (family.encode_clip(pipeline, video, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first["first_frame"], again["first_frame"])
    family.encode_clip(pipeline, video)
    assert not images[5].any(), "without a generator there is none"
    assert not images[0].any(), "the clip has none"
    strengths = []
    for seed in range(40):
        family.encode_clip(pipeline, video[:, :1], torch.Generator().manual_seed(seed))
        strengths.append(images[-1].std().log())
    assert torch.stack(strengths).mean().item() == pytest.approx(-3, abs=0.25)
    assert torch.stack(strengths).std().item() == pytest.approx(0.5, abs=0.2)


def test_learned_positions_hold_for_one_size(open_tiny: OpenTiny, checkpoints: Path, tmp_path: Path) -> None:
    family = open_version("5B-I2V", open_tiny, checkpoints)
    assert family.only_size == (96, 64)
    size = "data.width=96", "data.height=64", "data.frames=17"
    assert open_family(settings(family, *size)).only_size
    with pytest.raises(UserError, match="96 x 64 pixels alone"):
        open_family(settings(family, *size, "data.height=96"))
    write_demo_clips(tmp_path / "clips", count=4)
    form = ClipForm(96, 64, 17, 8)
    clips = drained(scan(family, tmp_path / "clips", form), lambda _: None)
    assert {(clip.bucket.width, clip.bucket.height) for clip in clips} == {(96, 64)}


def test_learned_positions_are_read_with_the_weights(open_tiny: OpenTiny, checkpoints: Path) -> None:
    """Of a transformer too that is quantized while it is read."""
    family = open_version("5B-I2V", open_tiny, checkpoints)
    positions = (
        transformer.patch_embed.pos_embedding
        for transformer in (family.load_transformer(torch.float32, int8=True), family.load_transformer(torch.float32))
    )
    torch.testing.assert_close(*positions, rtol=0, atol=0)


def test_settings_that_mean_nothing_here_are_refused(open_tiny: OpenTiny) -> None:
    family = open_tiny("cogvideox", "t2v")
    assert isinstance(family, CogVideoX)
    assert settings(family).train.timestep_sampling == "uniform"
    with pytest.raises(UserError, match="it weights the noise levels of flow matching"):
        open_family(settings(family, "train.loss_weighting=cosmap"))
    for task, other in (("t2v", "i2v"), ("i2v", "t2v")):
        with pytest.raises(UserError, match=f"not '{other}'; --checkpoint zai-org/CogVideoX-5b"):
            CogVideoX(open_tiny("cogvideox", task).base.name, other)


class SeenKernels(TorchFunctionMode):
    """Records which kernels are allowed when attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: set[tuple[bool, bool]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.allowed.add((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_chosen_kernel_computes_attention(open_tiny: OpenTiny) -> None:
    """Its attention in diffusers has no choice of backends."""
    family = of_depth(open_tiny("cogvideox", "t2v"), 2)
    profile = placed(family, {"train": {"attention": "flash", "gradient_accumulation": 1}})
    training = Training(family, profile, clips_of(family, profile))
    with SeenKernels() as seen:
        training.step()
    assert seen.allowed == {(True, False)}
