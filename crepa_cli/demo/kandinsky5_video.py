"""A tiny Kandinsky 5 Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Modulation
from torch import nn

from crepa_cli.demo.kandinsky import tiny_text_encoders, tiny_vae

PIECES = 475
"""With this many, the tokenizer has as many tokens for the template as the pipeline cuts off: 128."""


def write_tiny(folder: Path, task: str) -> None:
    """Write a checkpoint of twelve blocks of width 64, with latents of four channels."""
    pipeline_class = Kandinsky5T2VPipeline if task == "t2v" else Kandinsky5I2VPipeline
    pipeline = pipeline_class(
        transformer=tiny_transformer(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipeline.register_modules(**tiny_text_encoders(pipeline.prompt_template, PIECES))
    pipeline.save_pretrained(folder)


def tiny_transformer(**settings: Any) -> Kandinsky5Transformer3DModel:
    """Twelve blocks of width 64 for latents of four channels; `settings` replace those of the configuration."""
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 64}
    blocks = {"model_dim": 64, "ff_dim": 128, "num_text_blocks": 2, "num_visual_blocks": 12, "axes_dims": (4, 6, 6)}
    transformer = Kandinsky5Transformer3DModel(**{**sizes, **blocks, "visual_cond": True, **settings})
    for module in transformer.modules():
        # They start at 0, where blocks do nothing and their LoRA learns nothing.
        if isinstance(module, Kandinsky5Modulation):
            nn.init.normal_(module.out_layer.weight, std=0.1)
            nn.init.normal_(module.out_layer.bias, std=0.1)
    return transformer
