"""Parts of the tiny checkpoints that the demo and the tests train: published formats, few and random weights."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaTokenizer,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Tokenizer,
)

SEED = 0


def write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Create a folder with `write` unless it exists; it appears whole or not at all.

    Weights are drawn from a fixed seed, and the global random state is left as it was.
    """
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            write(partial)
        partial.replace(folder)
    return folder


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are single characters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose pieces are single bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])


def tiny_clip_text(width: int) -> dict[str, Any]:
    """A CLIP text encoder of this width and its tokenizer, by their names in pipelines that have another one too."""
    tokenizer = tiny_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModel(config)}


def tiny_qwen_tokenizer(template: str, pieces: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer that knows the words of a template of prompts.

    The pipelines of Kandinsky cut off as many tokens as the published tokenizer has for their template. The number of
    pieces decides how many this one has.
    """
    alphabet = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[]).train_new_from_iterator(
        [template], vocab_size=pieces, show_progress=False
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def tiny_clip_vision() -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """A CLIP image encoder of width 32 and its processor, for images of 32 pixels."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPVisionModel(config), processor


def tiny_siglip_vision() -> tuple[SiglipVisionModel, SiglipImageProcessor]:
    """A SigLIP image encoder of width 32 and its processor, for images of 32 pixels."""
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return SiglipVisionModel(config), SiglipImageProcessor(size={"height": 32, "width": 32})


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer whose pieces are single characters, and bytes for the rest; texts start with `<bos>`."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = ["\n", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokenizer = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def smooth_video(frames: int, size: int) -> Tensor:
    """`[1, 3, F, size, size]` in [-1, 1] that looks like a video to a VAE: smooth in space and time."""
    coarse = torch.rand(1, 3, 1 + frames // 8, 6, 6) * 2 - 1
    return F.interpolate(coarse, size=(frames, size, size), mode="trilinear")


@torch.no_grad()
def normalize_latents(vae: ModelMixin, video: Tensor) -> None:
    """Set the mean and std that a VAE carries so that this video's latents have mean 0 and std 1.

    A published VAE carries figures of its training data; random weights need figures of their own.
    """
    latents = vae.encode(video).latent_dist.mode().float()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    buffers = dict(vae.named_buffers())
    if "latents_mean" in buffers:
        buffers["latents_mean"].copy_(mean)
        buffers["latents_std"].copy_(std)
    else:
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
