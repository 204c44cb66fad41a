"""A tiny Kandinsky 6."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
)
from diffusers.pipelines.kandinsky6.pipeline_kandinsky6_ti2va import _PROMPT_TEMPLATE

from crepa_cli.demo.kandinsky import WIDTH, tiny_text_encoders, tiny_vae

PIECES = 473
"""With this many, the tokenizer has as many tokens for the template as the pipeline cuts off: 129."""
AUDIO_CHANNELS, MEL_BINS = 4, 16


def write_tiny(folder: Path, task: str) -> None:  # noqa: ARG001 (one checkpoint serves both tasks)
    """Write a checkpoint of twelve blocks of width 64, with latents of four channels and audio of width 16."""
    Kandinsky6TI2VAPipeline(
        transformer=_tiny_transformer(),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=MMAudioVAE(
            mel_bins=MEL_BINS,
            latent_channels=AUDIO_CHANNELS,
            hidden_channels=8,
            channel_multipliers=(1, 1),
            layers_per_block=1,
            n_fft=64,
            hop_length=16,
        ),
        vocoder=MMAudioVocoder(
            num_mels=MEL_BINS,
            upsample_initial_channel=8,
            upsample_rates=(4, 4),
            upsample_kernel_sizes=(8, 8),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),),
        ),
        **tiny_text_encoders(_PROMPT_TEMPLATE, PIECES),
    ).save_pretrained(folder)


def _tiny_transformer() -> Kandinsky6Transformer3DModel:
    return Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=64,
        model_dim=64,
        ff_dim=128,
        num_text_blocks=1,
        num_visual_blocks=12,
        axes_dims=(4, 6, 6),
        in_audio_dim=AUDIO_CHANNELS,
        out_audio_dim=AUDIO_CHANNELS,
        model_dim_a=16,
        time_dim_a=16,
        ff_dim_a=32,
        audio_freqs_scaling=0.144,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
