"""CogVideoX: text to video, and image to video from the latents of the first frame (arXiv 2408.06072)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler, DiffusionPipeline
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.errors import UserError
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.family import Family, Tensors, TransformerStep
from crepa_cli.models.noise import VPrediction
from crepa_cli.models.vae import encoded_latents, scaled_latents, video_of_scaled

FRAMES_OF_A_CHUNK = 8
"""The VAE works on chunks of this many frames, the first of which has one more; it decodes no other length."""
IMAGE_NOISE = -3.0, 0.5
"""Mean and standard deviation of the logarithm of the noise on a first frame in training (finetune/models)."""
OFS = 2.0
"""The offset that the pipelines of version 1.5 give the transformer."""
LAYERS_OF_5B = 42

VERSION_1_5 = {"data": {"width": 1360, "height": 768, "frames": 81, "fps": 16.0}}


class CogVideoX(Family):
    """CogVideoX transformers of 2B and 5B, of version 1.0 and 1.5; hidden states are row-major patches of the video.

    Version 1.5 joins two latent frames into a patch. Their number is made even by one more in front, a copy of the
    first one.
    """

    name = "cogvideox"
    transformer_class = "CogVideoXTransformer3DModel"
    blocks_attribute = "transformer_blocks"
    attention_parts = ("attn1",)
    token_parts = ("ff",)
    pipelines = {"t2v": "CogVideoXPipeline", "i2v": "CogVideoXImageToVideoPipeline"}
    checkpoints = {"t2v": "zai-org/CogVideoX-5b", "i2v": "zai-org/CogVideoX-5b-I2V"}
    samples_posterior = True
    vae_tiling = True
    negative_prompt = ""
    first_states_stay = True
    guides_in_one_batch = True
    # THUDM/CogVideo: finetune/schemas/args.py and README.md; the block is that of the CREPA paper, for 5B.
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 128,
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
            "export": ["diffusers"],
        },
        "data": {"width": 720, "height": 480, "frames": 49, "fps": 8.0},
        "train": {"learning_rate": 2e-5, "timestep_sampling": "uniform"},
        "validation": {"guidance_scale": 6.0},
    }
    full_settings = {
        "train": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100, "weight_decay": 1e-4},
    }
    published = {
        "zai-org/CogVideoX-2b": {},
        "zai-org/CogVideoX-5b": {},
        "zai-org/CogVideoX-5b-I2V": {},
        "zai-org/CogVideoX1.5-5B": VERSION_1_5,
        "zai-org/CogVideoX1.5-5B-I2V": VERSION_1_5,
    }
    noise_process: VPrediction
    caption_tokens: int

    def __init__(self, checkpoint: str, task: str, revision: str | None = None, variant: str | None = None) -> None:
        super().__init__(checkpoint, task, revision, variant)
        takes_image = self.config["in_channels"] != self.config["out_channels"]
        if takes_image != (task == "i2v"):
            raise UserError(
                f"{checkpoint} generates from {'an image' if takes_image else 'text alone'}, not {task!r}; "
                f"--checkpoint {self.checkpoints[task]} does, and so does leaving --checkpoint out"
            )
        self.caption_tokens = int(self.config["max_text_seq_length"])
        if self.config.get("use_learned_positional_embeddings"):
            # Image to video of version 1.0.
            width, height = (self._pixels * int(self.config[f"sample_{side}"]) for side in ("width", "height"))
            self.only_size = width, height
        schedule = self.base.read_config("scheduler/scheduler_config.json")
        self.noise_process = VPrediction(CogVideoXDDIMScheduler.from_config(schedule).alphas_cumprod)

    @classmethod
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:
        """Version 1.5 by its patches of two latent frames, and 2B by its depth."""
        config = base.read_config("transformer/config.json")
        if task == "t2v" and config.get("num_layers", LAYERS_OF_5B) < LAYERS_OF_5B:
            return "zai-org/CogVideoX-2b"
        version = "CogVideoX1.5-5B" if config.get("patch_size_t") else "CogVideoX-5b"
        return f"zai-org/{version}{'-I2V' if task == 'i2v' else ''}"

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch: 16 pixels."""
        return self._pixels * self.patch[2]

    @property
    def frame_multiple(self) -> int:
        """The frames of a chunk of the VAE."""
        return FRAMES_OF_A_CHUNK

    @property
    def _pixels(self) -> int:
        return int(2 ** (len(self.base.read_config("vae/config.json")["block_out_channels"]) - 1))

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[226, D]` of the T5 encoder."""
        embeds, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.caption_tokens
        )
        return {"prompt_embeds": embeds[0]}

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """`prompt_embeds` `[226, D]`."""
        return {"prompt_embeds": torch.empty(self.caption_tokens, self.config["text_embed_dim"], dtype=dtype)}

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, scaled, and for image to video `first_frame` `[C, 1, h, w]`, encoded on its own.

        The generator also draws noise for the first frame, as the authors' training does in every step; here it is the
        same in every step.
        """
        vae = pipeline.vae
        latents = scaled_latents(vae, video, generator)
        latents = torch.cat([latents[:, :1]] * (self.patch[0] - 1) + [latents], dim=1)
        if self.task == "t2v":
            return {"latents": latents}
        # The pipelines divide the latents of images by the factor where the authors forgot to scale them in training.
        scale = vae.config.scaling_factor ** (-1 if vae.config.invert_scale_latents else 1)
        image = _with_noise(video[:, :1], generator)
        return {"latents": latents, "first_frame": encoded_latents(vae, image, generator) * scale}

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is."""
        return video_of_scaled(pipeline.vae, latents[:, self.patch[0] - 1 :])

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Frames come before channels; the first frame's latents are further channels of the first latent frame."""
        latents, grid = batch["latents"], self.token_grid(batch["latents"])
        hidden = self.noise_process.add_noise(latents, noise, sigmas)
        if self.task == "i2v":
            behind = latents.shape[2] - 1
            hidden = torch.cat([hidden, F.pad(batch["first_frame"], (0, 0, 0, 0, 0, behind))], dim=1)
        inputs: dict[str, Any] = {
            "hidden_states": hidden.transpose(1, 2),
            "encoder_hidden_states": batch["prompt_embeds"],
            "timestep": self.noise_process.timesteps(sigmas),
        }
        if self.config["use_rotary_positional_embeddings"]:
            inputs["image_rotary_emb"] = self._rotation(grid, latents.device)
        if self.config.get("ofs_embed_dim"):
            inputs["ofs"] = latents.new_full((1,), OFS)
        return TransformerStep(inputs, self.noise_process.target(latents, noise, sigmas).transpose(1, 2))

    def _rotation(self, grid: TokenGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' rotary positions, `[N, D]` each.

        Version 1.0 stretches the positions of other sizes over those of its own size.
        """
        size = grid.rows, grid.columns
        positions: dict[str, Any] = {"crops_coords": None, "grid_type": "slice", "max_size": size}
        if self.patch[0] == 1:
            own = (self.config[f"sample_{side}"] // self.config["patch_size"] for side in ("width", "height"))
            positions = {"crops_coords": get_resize_crop_region_for_grid(size, *own)}
        cosines, sines = get_3d_rotary_pos_embed(
            self.config["attention_head_dim"],
            grid_size=size,
            temporal_size=grid.frames,
            device=device,
            **positions,
        )
        return cosines, sines


def _with_noise(image: Tensor, generator: torch.Generator | None) -> Tensor:
    """An image `[3, 1, H, W]` with noise, whose strength is drawn as in the authors' training; None adds none."""
    if generator is None:
        return image
    mean, deviation = IMAGE_NOISE
    strength = (mean + deviation * torch.randn(1, generator=generator)).exp()
    return image + (strength * torch.randn(image.shape, generator=generator)).to(image)
