"""The common part of both generations of HunyuanVideo: attention to captions, the VAE's latents, names of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from crepa_cli.models.family import Family
from crepa_cli.models.vae import video_of_scaled

BLOCK_NAMES = {
    r"^transformer_blocks\b": "double_blocks",
    r"\battn\.to_[qkv]$": "img_attn_qkv",
    r"\battn\.add_[qkv]_proj$": "txt_attn_qkv",
    r"\battn\.to_out\.0$": "img_attn_proj",
    r"\battn\.to_add_out$": "txt_attn_proj",
    r"\battn\.norm_([qk])$": r"img_attn_\1_norm",
    r"\battn\.norm_added_([qk])$": r"txt_attn_\1_norm",
    r"\bnorm1\.linear$": "img_mod.linear",
    r"\bnorm1_context\.linear$": "txt_mod.linear",
    r"\bff\.net\.0\.proj$": "img_mlp.fc1",
    r"\bff\.net\.2$": "img_mlp.fc2",
    r"\bff_context\.net\.0\.proj$": "txt_mlp.fc1",
    r"\bff_context\.net\.2$": "txt_mlp.fc2",
    r"^context_embedder\.token_refiner\.refiner_blocks\b": "txt_in.individual_token_refiner.blocks",
    r"^(txt_in\..*\.)img_attn_(qkv|proj)$": r"\1self_attn_\2",
    r"^(txt_in\..*\.)img_mlp\b": r"\1mlp",
    r"^(txt_in\..*\.)norm_out\.linear$": r"\1adaLN_modulation.1",
    r"^context_embedder\.proj_in$": "txt_in.input_embedder",
    r"^x_embedder\b": "img_in",
    r"^norm_out\.linear$": "final_layer.adaLN_modulation.1",
    r"^proj_out$": "final_layer.linear",
}
"""Patterns in the names of diffusers, and their replacements in those of Tencent's checkpoints."""


class CaptionAttention(HunyuanVideoAttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """Attention of clips and their captions to each other, without a mask.

    The transformers of diffusers mask the padding of captions, in version 1.5 with a number for every pair of tokens in
    every block: gigabytes for an ordinary clip. Here no token of a caption is padding, or each clip attends to its own
    caption alone, one clip after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lengths: Sequence[int] | None = None

    def take_captions(
        self, _transformer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook of the transformer: cuts padding off, and keeps the captions' lengths for the attention.

        In training the argument `text_lengths` says them; the pipelines give a mask.
        """
        lengths = keywords.pop("text_lengths", None)
        if lengths is None:
            embeds, mask = (keywords[f"encoder_{name}"] for name in ("hidden_states", "attention_mask"))
            lengths = mask.bool().sum(dim=1).tolist()
            keywords = keywords | {
                "encoder_hidden_states": embeds[:, : max(lengths)],
                "encoder_attention_mask": mask_of(embeds, lengths),
            }
        self.limit_to(lengths)
        return arguments, keywords

    def limit_to(self, lengths: Sequence[int]) -> None:
        """Take this many tokens of each clip's caption in the forward pass that follows."""
        self._lengths = lengths if min(lengths) < max(lengths) else None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,  # noqa: ARG002 (an argument of diffusers; not needed here)
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The clips and the captions."""
        attended: tuple[Tensor, Tensor]
        if self._lengths is None:
            attended = super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
        else:
            attended = self._one_by_one(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        return attended

    # Compiled, the attention would be compiled anew for every combination of lengths.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type here
    def _one_by_one(
        self, attn: nn.Module, hidden: Tensor, captions: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert self._lengths is not None
        attended = [
            super(CaptionAttention, self).__call__(
                attn, hidden[index : index + 1], captions[index : index + 1, :length], None, rotation
            )
            for index, length in enumerate(self._lengths)
        ]
        longest = captions.shape[1]
        padded = [F.pad(caption, (0, 0, 0, longest - caption.shape[1])) for _, caption in attended]
        return torch.cat([video for video, _ in attended]), torch.cat(padded)


def mask_of(embeds: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mask `[B, L]` of captions of some lengths up to `L`, in the dtype of their embeddings: 1 without padding."""
    mask = embeds.new_zeros(len(lengths), max(lengths))
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return mask


class Hunyuan(Family):
    """Transformers whose blocks see the video and its caption; captured states are the video's, row-major."""

    blocks_attribute = "transformer_blocks"
    attention_parts = ("attn",)
    token_parts = ("ff",)
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    vae_tiling = True
    negative_prompt = ""
    comfyui_joined = {
        "img_attn_qkv": ("to_q", "to_k", "to_v"),
        "txt_attn_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "self_attn_qkv": ("to_q", "to_k", "to_v"),
    }

    def _adapted(self, transformer: ModelMixin) -> ModelMixin:
        """With attention that needs no mask."""
        attend = self._caption_attention()
        transformer.register_forward_pre_hook(attend.take_captions, with_kwargs=True)
        blocks: Any = self.blocks(transformer)
        for block in blocks:
            block.attn.set_processor(attend)
        return super()._adapted(transformer)

    def _caption_attention(self) -> CaptionAttention:
        return CaptionAttention()

    def original_rows(self, module: str, tensor: Tensor) -> Tensor:
        """The last modulation has the shift before the scale in the original checkpoint, and behind it in diffusers."""
        return torch.cat(tensor.chunk(2)[::-1]) if module == "norm_out.linear" else tensor

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is."""
        return video_of_scaled(pipeline.vae, latents)
