"""The small text encoder and its tokenizer, which knows the words of the scenes."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from crepa_cli.demo.scenes import (
    BACKGROUNDS,
    SCENE_COLORS,
    SCENE_SHAPES,
    SCENE_TEXTURES,
    UNSEEN_SHAPE,
)

TOKENS = 12
"""A caption and at least one token of padding."""
PROMPT_TOKENS = 512
"""Length that the pipeline pads prompts to."""


def new_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with a piece for each word of the captions, and single characters for all other text."""
    grammar = ("a", "moves", "left", "right", "up", "down", "over", "background")
    words = [*grammar, *SCENE_TEXTURES, *SCENE_COLORS, *SCENE_SHAPES, UNSEEN_SHAPE, *BACKGROUNDS]
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # A word costs less than its characters, so that it is not taken apart.
    pieces = [(f"▁{word}", -1.0) for word in words if word != "a"] + [("▁a", -1.0)]
    return T5Tokenizer(vocab=[*special, *pieces, *((piece, -10.0) for piece in characters)], extra_ids=0)


def new_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Two layers of width 64."""
    torch.manual_seed(2)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def embed(encoder: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Embeddings `[B, TOKENS, D]` as the pipeline makes them: 0 after the end of a caption."""
    states: Tensor = encoder(tokens, mask).last_hidden_state
    return states * mask[:, :, None]


def padding_bias(mask: Tensor) -> Tensor:
    """A bias of the cross-attention `[B, 1, 1, TOKENS]` that lets the padding weigh as much as in `PROMPT_TOKENS`.

    All padding is equal, so few tokens stand for many.
    """
    length = mask.sum(1, keepdim=True)
    bias = torch.log((PROMPT_TOKENS - length) / (TOKENS - length))
    return torch.where(mask.bool(), 0.0, bias)[:, None, None]
