"""A tiny teacher."""

from __future__ import annotations

from pathlib import Path

from transformers import Dinov2Config, Dinov2Model


def write_tiny_dinov2(folder: Path) -> None:
    """Write a DINOv2 of two layers and width 48, with random weights, in the published layout."""
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, layerscale_value=1.0
    )
    Dinov2Model(config).save_pretrained(folder)
