"""The behavior that every family guarantees for each of its tasks."""

from __future__ import annotations

from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import OpenTiny, moving_pattern
from PIL import Image
from published_configs import PUBLISHED
from torch import Tensor

from crepa_cli.alignment import Crepa
from crepa_cli.memory.step import fake_memory, make_fake
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.capture import HiddenStateCapture
from crepa_cli.models.family import Family, Tensors
from crepa_cli.training.flow import diffusion_loss, sample_sigmas

CAPTION = "colored waves drift"
FPS = 20.0
FRAMES = {("kandinsky5_video", "i2v"): 17}
"""Its pipeline adjusts the statistics of the first four latent frames to those of the following frames."""
STEPS = {"ltxvideo": 60, "kandinsky6": 110, "ltx2": 80, "hunyuanvideo15": 80, "hunyuanvideo": 80}
"""Step counts of the families for which 150 are more than enough."""
OTHER_GUIDANCE: dict[str, dict[str, Any]] = {
    "ltx2": dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0)
    | dict.fromkeys(("audio_guidance_scale", "modality_scale", "audio_modality_scale"), 1.0),
    "kandinsky6": {"sample_audio": False},
}
"""Arguments that leave out what a pipeline does beside classifier-free guidance, and sound that changes the video."""
EMBEDDED_GUIDANCE = {"hunyuanvideo": 6.0}
"""The strength that a transformer takes as an input, which in training is the same for all clips."""
TASKS = [(name, task) for name in FAMILIES for task in load_family(name).pipelines]


def encoded_clip(family: Family, frames: int, height: int, width: int) -> tuple[Tensor, Tensors]:
    """A video and the tensors that preparation stores for it, without a batch dimension."""
    video = moving_pattern(frames, height, width)
    with torch.no_grad():
        tensors = family.encode_clip(family.load_vae_pipeline(), video)
        tensors |= family.encode_prompt(family.load_text_pipeline(torch.float32), CAPTION)
    return video, tensors | {"fps": torch.tensor(FPS)}


def batch_of(tensors: Tensors, size: int) -> Tensors:
    return {name: torch.stack([tensor] * size) for name, tensor in tensors.items()}


def first_frame(video: Tensor) -> Image.Image:
    pixels = ((video[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    return Image.fromarray(pixels)


def sampled_latents(
    family: Any, pipeline: Any, video: Tensor, latents: Tensor, steps: int, guidance: float = 1.0, **prompts: Any
) -> Tensor:
    """The latents `[C, T, h, w]` that the published pipeline generates for the caption, at the size of the video.

    `prompts` are other arguments than the caption.
    """
    frames, height, width = video.shape[1:]
    arguments = family.form_arguments(width=width, height=height, frames=frames, fps=FPS)
    arguments |= family.guide(pipeline, EMBEDDED_GUIDANCE.get(family.name, guidance))
    if family.task == "i2v":
        arguments["image"] = first_frame(video)
    if family.caption_tokens:
        arguments["max_sequence_length"] = family.caption_tokens
    if family.name == "kandinsky5_video":
        pipeline._get_scale_factor = family.rotary_scale
    sampled: Tensor = pipeline(
        **prompts or {"prompt": CAPTION} | OTHER_GUIDANCE.get(family.name, {}),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **arguments,
    ).frames
    if sampled.ndim == 3:
        sampled = pipeline._unpack_latents(sampled, *latents.shape[1:])
    if family.name == "kandinsky5_video":
        sampled = sampled.movedim(-1, 1)
    if family.name == "cogvideox":
        sampled = sampled.transpose(1, 2)
    if family.name == "ltx2":
        sampled = pipeline._normalize_latents(sampled, pipeline.vae.latents_mean, pipeline.vae.latents_std)
    return sampled[0]


def overfitted(family: Family, tensors: Tensors, steps: int) -> torch.nn.Module:
    """The family's transformer, trained on one clip at the noise levels that it covers."""
    batch = batch_of(tensors, 4)
    transformer = family.load_transformer(torch.float32).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.0)
    # Without the slow start SANA's linear attention dies and the loss stays where it is.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    shift = family.timestep_shift(batch["latents"])
    for _ in range(steps):
        sigmas = sample_sigmas(4, "logit_normal", shift, generator, family.sigma_range)
        noise = torch.randn(batch["latents"].shape, generator=generator)
        step = family.step(batch, noise, sigmas)
        prediction = transformer(**step.inputs).sample
        diffusion_loss(prediction, step, sigmas, "none").backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return transformer.eval()


def sampled_similarity(family: Family, video: Tensor, tensors: Tensors, **transformers: torch.nn.Module) -> float:
    """The cosine between a clip's latents and those that the published pipeline samples with these transformers.

    The lower one of two samples: of the caption alone, and of encoded prompts against the published negative prompt.
    """
    pipeline_class = getattr(diffusers, family.pipeline_class)
    pipeline = pipeline_class.from_pretrained(family.base.name, **transformers)
    of_text = _similarity(family, pipeline, video, tensors)
    with torch.no_grad():
        negative = family.encode_negative_prompt(family.load_text_pipeline(torch.float32), family.negative_prompt)
    prompt = {name: tensors[name] for name in negative}
    guided = family.sampling_arguments(prompt, negative) | OTHER_GUIDANCE.get(family.name, {})
    of_encoded_prompts = _similarity(
        family, family.for_encoded_prompts(pipeline), video, tensors, **guided, guidance=2.0
    )
    return min(of_text, of_encoded_prompts)


def _similarity(family: Family, pipeline: Any, video: Tensor, tensors: Tensors, **prompts: Any) -> float:
    latents = tensors["latents"]
    sampled = sampled_latents(family, pipeline, video, latents, 30, **prompts)
    return float(torch.cosine_similarity(sampled.flatten(), latents.flatten(), dim=0))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_an_overfitted_transformer_gives_its_clip_back(name: str, task: str, open_tiny: OpenTiny) -> None:
    """Noise, target, timesteps, normalization and conditions agree with the published pipeline, or this fails."""
    torch.manual_seed(0)
    family = open_tiny(name, task)
    height = width = 2 * family.size_multiple
    frames = FRAMES.get((name, task), 2 * family.frame_multiple + 1)
    video, tensors = encoded_clip(family, frames, height, width)
    transformer = overfitted(family, tensors, STEPS.get(name, 150))
    assert sampled_similarity(family, video, tensors, transformer=transformer) >= 0.8


@pytest.mark.parametrize("name", [name for name, task in TASKS if task == "t2v"])
def test_an_image_trains_and_is_aligned_frame_by_frame(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    assert family.trains_images
    height, width = 2 * family.size_multiple, 4 * family.size_multiple
    image, tensors = encoded_clip(family, 1, height, width)
    with torch.no_grad():
        assert family.decode_latents(family.load_vae_pipeline(), tensors["latents"]).shape == image.shape
    batch = batch_of(tensors, 2)
    transformer = family.load_transformer(torch.float32)
    capture = HiddenStateCapture(family.blocks(transformer), [0])
    noise, sigmas = torch.randn_like(batch["latents"]), torch.tensor([0.3, 0.8]).clamp(*family.sigma_range)
    step = family.step(batch, noise, sigmas)
    with torch.no_grad(), capture.recording() as recorded:
        prediction = transformer(**step.inputs).sample
    assert prediction.shape == step.target.shape
    assert diffusion_loss(prediction, step, sigmas, "none").isfinite()
    grid = family.token_grid(batch["latents"])
    assert grid.frames == 1
    hidden = family.row_major(recorded[0], grid)
    features = torch.randn(2, 1, grid.tokens, 8)
    apart, alone = (Crepa(hidden.shape[-1], 8, adjacent_distance=distance) for distance in (1, 0))
    alone.load_state_dict(apart.state_dict())
    found, expected = (crepa(hidden, features, grid, grid) for crepa in (apart, alone))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.similarity, found.self_similarity)


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_captured_tokens_are_where_the_grid_says(name: str, task: str, open_tiny: OpenTiny) -> None:
    """Changing one patch of one latent frame changes the state at the same frame, row and column the most."""
    torch.manual_seed(0)
    family = open_tiny(name, task)
    multiple, frames = family.size_multiple, 3 * family.frame_multiple + 1
    _, tensors = encoded_clip(family, frames, height=4 * multiple, width=6 * multiple)
    batch = batch_of(tensors, 2)
    transformer = family.load_transformer(torch.float32).eval()
    grid = family.token_grid(batch["latents"])
    capture = HiddenStateCapture(family.blocks(transformer), [0])
    noise, sigmas = torch.randn_like(batch["latents"]), torch.full((2,), 0.5)

    def states(noise: Tensor) -> Tensor:
        step = family.step(batch, noise, sigmas)
        with torch.no_grad(), capture.recording() as recorded:
            transformer(**step.inputs)
        return family.row_major(recorded[0], grid)

    before = states(noise)
    assert before.shape[:3] == (2, grid.frames, grid.tokens)
    scale_t, scale_h, scale_w = (
        size // tokens for size, tokens in zip(noise.shape[2:], (grid.frames, grid.rows, grid.columns), strict=True)
    )
    for clip, frame, row, column in [(0, 1, 0, 1), (1, 2, 3, 4), (0, grid.frames - 1, 2, 0), (1, 1, 1, 5)]:
        changed = noise.clone()
        changed[
            clip,
            :,
            frame * scale_t : (frame + 1) * scale_t,
            row * scale_h : (row + 1) * scale_h,
            column * scale_w : (column + 1) * scale_w,
        ] += 3.0
        change = (states(changed) - before).norm(dim=-1)
        assert change.flatten().argmax() == (clip * grid.frames + frame) * grid.tokens + row * grid.columns + column


@pytest.mark.parametrize(("name", "repository"), PUBLISHED)
def test_the_default_block_of_a_published_checkpoint_is_captured(
    name: str, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts come from the configuration alone, without a network, and the transformer accepts the family's inputs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    published = PUBLISHED[name, repository]
    family = load_family(name)(repository, published.task)
    assert (family.block_count, family.hidden_size) == (published.blocks, published.hidden_size)
    assert (family.frame_multiple, family.size_multiple) == (published.frame_multiple, published.size_multiple)

    index = family.settings["crepa"]["block_index"]
    assert isinstance(index, int)
    lengths = {key: torch.tensor([8]) for key in ("prompt_length", "prompt_length_2")}
    with torch.device("meta"):
        transformer = family.empty_transformer(torch.float32)
    with fake_memory(), torch.no_grad():
        make_fake(transformer)
        batch = {key: torch.zeros(1, *shape) for key, shape in published.clip.items()} | {"fps": torch.ones(1)}
        batch |= lengths
        step = family.step(batch, torch.zeros_like(batch["latents"]), torch.full((1,), 0.5))
        capture = HiddenStateCapture(family.blocks(transformer), [index])
        with capture.recording() as recorded:
            transformer(**step.inputs)
    grid = family.token_grid(batch["latents"])
    states = family.row_major(recorded[index], grid)
    assert states.shape == (1, grid.frames, grid.tokens, published.hidden_size)
