"""A tiny HunyuanVideo 1.0."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from crepa_cli.demo.kandinsky import WIDTH, tiny_vae
from crepa_cli.demo.tiny import tiny_clip_text, tiny_qwen_tokenizer

PIECES = 475
"""With this many, the tokenizer has as many tokens before a caption as the pipeline cuts off: 95."""


def write_tiny(folder: Path, _task: str) -> None:
    """Write a checkpoint of four blocks of two streams and eight of one, of width 48, with latents of four channels."""
    tokenizer = _tiny_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=LlamaModel(llama),
        transformer=_tiny_transformer(),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **tiny_clip_text(WIDTH),
    ).save_pretrained(folder)


def _tiny_transformer() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=4,
        num_single_layers=8,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
    )


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as Llama 3 has one, that knows the words of the pipeline's instruction."""
    trained = tiny_qwen_tokenizer(str(DEFAULT_PROMPT_TEMPLATE["template"]), PIECES)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
    )
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer
