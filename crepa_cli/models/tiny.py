"""Parts of the tiny checkpoints that the demo and the tests train: published formats, few and random weights."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor
from transformers import T5Tokenizer

SEED = 0


def write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make a folder with `write` unless it is there; it appears whole or not at all.

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


def smooth_video(frames: int, size: int) -> Tensor:
    """`[1, 3, F, size, size]` in [-1, 1] that looks like a video to a VAE: smooth in space and time."""
    coarse = torch.rand(1, 3, 1 + frames // 8, 6, 6) * 2 - 1
    return F.interpolate(coarse, size=(frames, size, size), mode="trilinear")


@torch.no_grad()
def normalize_latents(vae: ModelMixin, video: Tensor) -> None:
    """Set the mean and std of a VAE's configuration so that this video's latents have mean 0 and std 1.

    A published VAE carries figures of its training data; random weights need figures of their own.
    """
    latents = vae.encode(video).latent_dist.mode().float()
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
