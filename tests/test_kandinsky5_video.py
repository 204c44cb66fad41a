"""Specifics of Kandinsky 5: the token order of NABLA attention, and captions of different lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny
from diffusers import Kandinsky5T2VPipeline
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from crepa_cli.demo.kandinsky5_video import tiny_transformer
from crepa_cli.models.capture import HiddenStateCapture
from crepa_cli.models.family import Tensors
from crepa_cli.models.kandinsky5_video import Kandinsky5Video
from crepa_cli.runs.capabilities import attention_mistakes
from crepa_cli.settings import resolve

NABLA = {"attention_type": "nabla", "attention_P": 0.9, "attention_wT": 3, "attention_wH": 3, "attention_wW": 3}


def random_batch(lengths: list[int], rows: int, columns: int) -> Tensors:
    """Two latent frames per clip, in patches of 2 x 2."""
    clips = len(lengths)
    return {
        "latents": torch.randn(clips, 4, 2, 2 * rows, 2 * columns),
        "prompt_embeds": torch.randn(clips, 512, 32),
        "prompt_length": torch.tensor(lengths),
        "pooled_embeds": torch.randn(clips, 32),
    }


@pytest.fixture
def nabla(open_tiny: OpenTiny, tmp_path: Path) -> Kandinsky5Video:
    """A checkpoint with NABLA attention."""
    folder = tmp_path / "nabla"
    folder.mkdir()
    for part in Path(open_tiny("kandinsky5_video", "t2v").base.name).iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    torch.manual_seed(0)
    tiny_transformer(**NABLA).save_pretrained(folder / "transformer")
    return Kandinsky5Video(str(folder), "t2v")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_squares_of_nabla_come_back_in_rows_and_columns(nabla: Kandinsky5Video) -> None:
    assert nabla.size_multiple == 128
    transformer = nabla.load_transformer(torch.float32).eval()
    batch = random_batch([5, 9], rows=16, columns=24)
    grid = nabla.token_grid(batch["latents"])
    noise, sigmas = torch.randn_like(batch["latents"]), torch.full((2,), 0.5)
    capture = HiddenStateCapture(nabla.blocks(transformer), [0])

    def states(noise: Tensor) -> Tensor:
        with torch.no_grad(), capture.recording() as recorded:
            transformer(**nabla.step(batch, noise, sigmas).inputs)
        return recorded[0]

    before = states(noise)
    for clip, frame, row, column in [(0, 0, 0, 1), (1, 1, 3, 20), (0, 1, 9, 7), (1, 0, 15, 23)]:
        changed = noise.clone()
        changed[clip, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 3.0
        change = (nabla.row_major(states(changed) - before, grid)).norm(dim=-1)
        assert change.shape == (2, grid.frames, grid.tokens)
        assert change.flatten().argmax() == (clip * grid.frames + frame) * grid.tokens + row * grid.columns + column
    in_order_of_the_block = (states(changed) - before).norm(dim=-1).argmax(dim=1)[1]
    assert in_order_of_the_block == 5 * 64 + 63


@pytest.mark.parametrize("train", [False, True])
def test_padding_behind_a_short_caption_is_not_seen(train: bool, open_tiny: OpenTiny) -> None:
    """A batch gives the same results as its clips one by one, which is how the pipeline samples them."""
    torch.manual_seed(0)
    family = open_tiny("kandinsky5_video", "t2v")
    transformer = family.load_transformer(torch.float32).requires_grad_(True)
    if train:
        transformer.enable_gradient_checkpointing()
        transformer.train()
    batch = random_batch([3, 11, 11], rows=2, columns=3)
    noise, sigmas = torch.randn_like(batch["latents"]), torch.tensor([0.2, 0.5, 0.9])

    def gradient(predictions: Tensor) -> Tensor:
        transformer.zero_grad()
        predictions.pow(2).sum().backward()
        return transformer.text_transformer_blocks[0].self_attention.to_query.weight.grad.clone()

    together = transformer(**family.step(batch, noise, sigmas).inputs).sample
    gradient_together = gradient(together)
    one_by_one = []
    for index in range(3):
        part = slice(index, index + 1)
        clip = {name: tensor[part] for name, tensor in batch.items()}
        one_by_one.append(transformer(**family.step(clip, noise[part], sigmas[part]).inputs).sample)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient_together, gradient(torch.cat(one_by_one)), rtol=1e-2, atol=1e-2)


def test_nabla_on_a_gpu_needs_compilation(nabla: Kandinsky5Video, open_tiny: OpenTiny) -> None:
    """Uncompiled, flex attention holds every score."""
    flags = {"model.family": "kandinsky5_video"}
    profile = resolve("t2v", flags).profile
    compiled = resolve("t2v", flags, ["train.compile=true"]).profile
    (mistake,) = attention_mistakes(profile, nabla, torch.device("cuda"))
    assert "set train.compile = true" in mistake
    assert not attention_mistakes(compiled, nabla, torch.device("cuda"))
    assert not attention_mistakes(profile, nabla, torch.device("cpu"))
    assert not attention_mistakes(profile, open_tiny("kandinsky5_video", "t2v"), torch.device("cuda"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lengths_of_captions_compile_no_block_anew(open_tiny: OpenTiny) -> None:
    family = open_tiny("kandinsky5_video", "t2v")
    transformer = family.load_transformer(torch.float32)
    graphs = CompileCounter()
    block = transformer.visual_transformer_blocks[0]
    block.forward = torch.compile(block.forward, backend=graphs)
    compiled = []
    for lengths in ([3, 11], [4, 9], [5, 11], [6, 11], [7, 8], [11, 2]):
        batch = random_batch(lengths, rows=2, columns=3)
        noise, sigmas = torch.randn_like(batch["latents"]), torch.tensor([0.2, 0.5])
        with torch.no_grad():
            transformer(**family.step(batch, noise, sigmas).inputs)
        compiled.append(graphs.frame_count)
    assert compiled[2:] == [compiled[1]] * 4


def test_prompts_are_those_of_the_published_pipeline(open_tiny: OpenTiny) -> None:
    family = open_tiny("kandinsky5_video", "t2v")
    published = Kandinsky5T2VPipeline.from_pretrained(family.base.name)
    embeds, pooled, ends = published.encode_prompt(["a red disc"])
    tensors = family.encode_prompt(family.load_text_pipeline(torch.float32), "a red disc")
    length = int(tensors["prompt_length"])
    assert length == ends[-1] > 5
    torch.testing.assert_close(tensors["prompt_embeds"][None, :length], embeds)
    torch.testing.assert_close(tensors["pooled_embeds"][None], pooled)
    assert tensors["prompt_embeds"].shape == (512, 32)


LITE, PRO = 1792, 4096


@pytest.mark.parametrize(
    ("width", "height", "columns", "scale"),
    [
        (LITE, 512, 768, 2),
        (LITE, 464, 832, 2),
        (LITE, 880, 448, 2),
        (LITE, 768, 1280, 2),
        (PRO, 512, 768, 2),
        (PRO, 464, 832, 2),
        (PRO, 768, 1280, 3.16),
        (PRO, 768, 1024, 3.16),
        (PRO, 1024, 1024, 3.16),
        (PRO, 1408, 640, 3.16),
    ],
)
def test_the_rotary_scale_is_that_of_the_official_configurations(
    width: int, height: int, columns: int, scale: float, open_tiny: OpenTiny
) -> None:
    """kandinskylab/kandinsky-5, configs/: Lite is SD at every size, Pro SD or HD."""
    tiny = open_tiny("kandinsky5_video", "t2v")
    family = Kandinsky5Video(tiny.base.name, "t2v")
    family.config = {**tiny.config, "model_dim": width}
    assert family.rotary_scale(height, columns) == (1, scale, scale)


@pytest.mark.parametrize(("width", "height"), [(832, 464), (448, 880)])
def test_training_and_validation_scale_positions_alike(width: int, height: int, open_tiny: OpenTiny) -> None:
    """At sizes of the default buckets for which the pipelines of diffusers take the scale of HD."""
    family = open_tiny("kandinsky5_video", "t2v")
    batch = random_batch([3], rows=height // 16, columns=width // 16)
    step = family.step(batch, torch.randn_like(batch["latents"]), torch.full((1,), 0.5))
    seen: list[tuple[float, float, float]] = []

    def record(_module: torch.nn.Module, _: tuple[()], inputs: dict[str, Any]) -> None:
        seen.append(inputs["scale_factor"])
        raise KeyboardInterrupt

    transformer = family.load_transformer(torch.float32)
    pipeline = family.load_sampling_pipeline(transformer)
    transformer.register_forward_pre_hook(record, with_kwargs=True)
    prompt = {"prompt_embeds": torch.zeros(512, 32), "prompt_length": torch.tensor(3), "pooled_embeds": torch.zeros(32)}
    with pytest.raises(KeyboardInterrupt):
        pipeline(
            **family.sampling_arguments(prompt, prompt),
            **family.form_arguments(width=width, height=height, frames=5, fps=24.0),
            num_inference_steps=1,
        )
    assert step.inputs["scale_factor"] == seen[0] == (1, 2, 2)
