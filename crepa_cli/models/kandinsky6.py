"""Kandinsky 6 (arXiv 2610.05608): text to video, and image to video from a reference behind the last frame.

The video is trained alone. Without sound, the blocks run their video path only, as in the pipeline's own call for that.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.errors import UserError
from crepa_cli.models.family import Tensors, TransformerStep
from crepa_cli.models.kandinsky import Kandinsky

LITE = "kandinskylab/Kandinsky-6.0-Lite-5s-Diffusers"


class Kandinsky6(Kandinsky):
    """Kandinsky 6 transformers of any size; hidden states are row-major patches of the video, then of the reference."""

    name = "kandinsky6"
    transformer_class = "Kandinsky6Transformer3DModel"
    attention_parts = ("video_dec_block.self_attention", "video_dec_block.cross_attention")
    token_parts = ("video_dec_block.feed_forward",)
    pipelines = dict.fromkeys(("t2v", "i2v"), "Kandinsky6TI2VAPipeline")
    checkpoints = dict.fromkeys(pipelines, LITE)
    prompt_tokens = 1024
    unused_components = ("audio_vae", "vocoder")
    uses_all_weights = False  # the audio takes no part
    no_audio = "crepa does not read the sound of clips, which the audio VAE of the checkpoint could encode"
    # The pipeline of diffusers has no method of its own for LoRA files.
    lora_loader = "transformer.load_lora_adapter"
    # kandinskylab/kandinsky-6: comfyui/kandinsky6/register.py.
    comfyui_names = {
        r"^visual_transformer_blocks\b": "visual_blocks",
        r"^audio_out_layer\b": "audio_outLayer",
        r"\btimestep_embedder\.linear_1$": "in_layer",
        r"\btimestep_embedder\.linear_2$": "out_layer",
        r"\b(video|audio)_dec_block\b": r"\1T",
        r"\bfeed_forward\.net\.0\.proj$": "feed_forward.in_layer",
        r"\bfeed_forward\.net\.2$": "feed_forward.out_layer",
        r"\battn\b": "self_attention",
    }
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 32,
            # Those of the video: the others get no gradient.
            "target_modules": [
                f"video_dec_block.{layer}"
                for layer in (
                    *(
                        f"{part}_attention.{layer}"
                        for part in ("self", "cross")
                        for layer in ("to_query", "to_key", "to_value", "out_layer")
                    ),
                    "feed_forward.net.0.proj",
                    "feed_forward.net.2",
                )
            ],
            "export": ["diffusers", "comfyui"],
        },
        # The model cards, and docs/source/en/api/pipelines/kandinsky6.md of diffusers.
        "data": {"width": 864, "height": 480, "frames": 121, "fps": 24.0},
        # musubi-tuner: docs/kandinsky6.md. The authors publish no training.
        "train": {"learning_rate": 1e-4},
        "validation": {"guidance_scale": 5.0},
    }
    # No full fine-tune is published; that of the other families' authors.
    full_settings = {"train": {"learning_rate": 1e-5}}
    published = {
        LITE: {},
        "kandinskylab/Kandinsky-6.0-Lite-pretrain-5s-Diffusers": {},
        "kandinskylab/Kandinsky-6.0-Pro-5s-Diffusers": {},
        "kandinskylab/Kandinsky-6.0-Pro-pretrain-5s-Diffusers": {},
    }

    def __init__(self, checkpoint: str, task: str, revision: str | None = None, variant: str | None = None) -> None:
        super().__init__(checkpoint, task, revision, variant)
        if self.config["out_visual_dim"] != self.config["in_visual_dim"]:
            raise UserError(
                f"{checkpoint} is distilled: it predicts several steps at once, not a velocity; --checkpoint {LITE} "
                "is not, and so is what leaving --checkpoint out takes"
            )
        if task == "i2v" and not (self.config["visual_cond"] and self.config["visual_token_type_num_embeddings"] > 1):
            raise UserError(f"{checkpoint} generates from text alone, not 'i2v'; --checkpoint {LITE} takes images too")

    @property
    def architecture(self) -> str:
        """After the name that other trainers give Kandinsky 5."""
        return "Kandinsky-6"

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[1024, D]` of Qwen2.5-VL, zero from `prompt_length` on; `pooled_embeds` `[E]` of CLIP."""
        embeds, pooled, mask, *_ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.prompt_tokens
        )
        return self.padded_prompt(embeds[0], pooled[0], self.prompt_tokens if mask is None else int(mask.sum()))

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Channels are last; the clean reference is one more frame, at the position of the first, and not scored."""
        hidden = self.noise_process.add_noise(batch["latents"], noise, sigmas)
        target = self.noise_process.target(batch["latents"], noise, sigmas)
        given = torch.zeros_like(hidden[:, :1])
        grid, device = self.token_grid(hidden), hidden.device
        inputs: dict[str, Any] = {}
        if self.task == "i2v":
            reference = batch["first_frame"]
            hidden, target = torch.cat([hidden, reference], dim=2), torch.cat([target, reference], dim=2)
            given = torch.cat([given, torch.ones_like(reference[:, :1])], dim=2)
            inputs["visual_token_type_ids"] = given[:, 0, :, 0, 0].long()
            rows, columns = (torch.arange(size, device=device) for size in (grid.rows, grid.columns))
            frames = torch.arange(grid.frames + 1, device=device) % grid.frames
            inputs["visual_rope_pos"] = frames, rows, columns
        if self.config["visual_cond"]:
            hidden = torch.cat([hidden, torch.zeros_like(hidden), given], dim=1)
        lengths = batch["prompt_length"].tolist()
        if min(lengths) < max(lengths):
            positions = torch.arange(max(lengths), device=device)
            inputs["encoder_attention_mask"] = torch.stack([positions < length for length in lengths])
        inputs |= {
            "hidden_states": hidden.movedim(1, -1),
            "timestep": sigmas * 1000,
            "encoder_hidden_states": batch["prompt_embeds"][:, : max(lengths)],
            "pooled_projections": batch["pooled_embeds"],
        }
        return TransformerStep(inputs, target.movedim(1, -1), (1 - given).movedim(1, -1))

    def row_major(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Hidden states of the video as `[B, T, N, H]`, without those of the reference behind them."""
        return super().row_major(hidden[:, : grid.frames * grid.tokens], grid)

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Both prompts without their padding, for a video without sound."""
        arguments: dict[str, Any] = {"sample_audio": False}
        for prefix, tensors in (("", prompt), ("negative_", negative_prompt)):
            arguments[f"{prefix}prompt_embeds"] = tensors["prompt_embeds"][None, : int(tensors["prompt_length"])]
            arguments[f"{prefix}pooled_prompt_embeds"] = tensors["pooled_embeds"][None]
        return arguments

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:
        """Size, length and frame rate, by which the sound is as long as the video."""
        return super().form_arguments(width=width, height=height, frames=frames, fps=fps) | {"frame_rate": fps}
