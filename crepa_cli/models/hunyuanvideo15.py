"""HunyuanVideo 1.5 (arXiv 2511.18870): text to video, and image to video from the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crepa_cli.errors import UserError
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.family import Tensors, TransformerStep
from crepa_cli.models.hunyuan import BLOCK_NAMES, CaptionAttention, Hunyuan, mask_of
from crepa_cli.models.vae import scaled_latents

TEMPLATE_TOKENS = 108
"""Tokens of the instruction before a caption, which the pipelines cut off after the text encoder."""
HD_SIDE = 960
"""Pixels that a square frame of the 720p checkpoints has along a side."""

HD = {"data": {"width": 1280, "height": 720}}


class UnpaddedCaptions(CaptionAttention):
    """The same for captions, texts in them and images, in a row."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def take_captions(
        self, transformer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook of the transformer: cuts padding off, and keeps the captions' lengths for the attention.

        In training the argument `text_lengths` says them; the pipelines give masks. What normalizes these inputs first
        needs them in its own dtype, which autocast does not see to on every device.
        """
        lengths = keywords.pop("text_lengths", None)
        if lengths is None:
            masks = (keywords[f"encoder_attention_mask{which}"] for which in ("", "_2"))
            captions, glyphs = (mask.bool().sum(dim=1).tolist() for mask in masks)
            embeds = keywords["encoder_hidden_states"], keywords["encoder_hidden_states_2"]
            # For text to video the pipeline gives a blank image, which no token attends to.
            image = keywords["image_embeds"][:, : 0 if self.task == "t2v" else None]
            keywords = keywords | caption_inputs(embeds, (captions, glyphs), image)
            lengths = keywords.pop("text_lengths")
        self.limit_to(lengths)
        dtype = transformer.image_embedder.norm_in.weight.dtype
        own = {name: keywords[name].to(dtype) for name in ("encoder_hidden_states_2", "image_embeds")}
        return arguments, keywords | own


def caption_inputs(
    embeds: tuple[Tensor, Tensor], lengths: tuple[Sequence[int], Sequence[int]], image: Tensor
) -> dict[str, Any]:
    """The transformer's inputs of captions, without the padding behind the longest one.

    Args:
        embeds: of the caption and of the texts in it, `[B, L, D]` each.
        lengths: of both, without padding, for each clip.
        image: features of the first frame `[B, N, D]`; no tokens without one.
    """
    inputs: dict[str, Any] = {"image_embeds": image}
    for which, tensor, counts in zip(("", "_2"), embeds, lengths, strict=True):
        inputs[f"encoder_hidden_states{which}"] = tensor[:, : max(counts)]
        inputs[f"encoder_attention_mask{which}"] = mask_of(tensor, counts)
    inputs["text_lengths"] = [sum(counts) + image.shape[1] for counts in zip(*lengths, strict=True)]
    return inputs


def causal_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int | None = None
) -> Tensor:
    """The mask of the VAE's `prepare_causal_attention_mask`: a token attends to its frame and to those before."""
    of_frames = torch.full((n_frame, n_frame), float("-inf"), dtype=dtype, device=device).triu(1)
    mask = of_frames.repeat_interleave(n_hw, 0).repeat_interleave(n_hw, 1)
    return mask if batch_size is None else mask.expand(batch_size, -1, -1)


class HunyuanVideo15(Hunyuan):
    """HunyuanVideo 1.5 for 480p and 720p; hidden states are row-major latents of the video.

    Captions are encoded by Qwen2.5-VL. The texts in quotation marks, which the video is to show, are encoded once more,
    by ByT5.
    """

    name = "hunyuanvideo15"
    transformer_class = "HunyuanVideo15Transformer3DModel"
    pipelines = {"t2v": "HunyuanVideo15Pipeline", "i2v": "HunyuanVideo15ImageToVideoPipeline"}
    checkpoints = {
        "t2v": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        "i2v": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
    }
    caption_lengths = (1000, 256)
    """Most tokens of a caption, and of the texts in it, in the pipelines' call."""
    samples_posterior = True
    read_on_cpu = frozenset({"prompt_length", "prompt_length_2"})
    uses_all_weights = False  # the last block's caption leads nowhere
    guider = "guider"
    lora_loader = "transformer.load_lora_adapter"
    architecture = "hunyuan-video-1.5"
    # Tencent-Hunyuan/HunyuanVideo-1.5: train.py and README.md; the block is the one of most families.
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 32,
            # The attention without the captions' queries and output, which lead nowhere in the last block.
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
            "export": ["diffusers", "comfyui"],
        },
        "data": {"width": 848, "height": 480, "frames": 121, "fps": 24.0},
        "train": {"learning_rate": 1e-4, "timestep_shift": 3.0},
        "validation": {"guidance_scale": 6.0},
    }
    full_settings = {"train": {"learning_rate": 1e-5}}
    published = {
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": {},
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": {},
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": HD,
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v": HD,
    }
    comfyui_names = {
        **BLOCK_NAMES,
        r"^context_embedder\.time_text_embed\.timestep_embedder\.": "txt_in.t_embedder.",
        r"^context_embedder\.time_text_embed\.text_embedder\.": "txt_in.c_embedder.",
        r"^context_embedder_2\.norm$": "byt5_in.layernorm",
        r"^context_embedder_2\.linear_": "byt5_in.fc",
        r"^image_embedder\.norm_in$": "vision_in.proj.0",
        r"^image_embedder\.linear_1$": "vision_in.proj.1",
        r"^image_embedder\.linear_2$": "vision_in.proj.3",
        r"^image_embedder\.norm_out$": "vision_in.proj.4",
        r"^time_embed\.timestep_embedder\.": "time_in.",
        r"^((?:time_in|txt_in\.[tc]_embedder)\.)linear_1$": r"\1in_layer",
        r"^((?:time_in|txt_in\.[tc]_embedder)\.)linear_2$": r"\1out_layer",
        r"^cond_type_embed$": "cond_type_embedding",
    }

    def __init__(self, checkpoint: str, task: str, revision: str | None = None, variant: str | None = None) -> None:
        super().__init__(checkpoint, task, revision, variant)
        takes_image = "image_encoder" in self.base.components
        if takes_image != (task == "i2v"):
            raise UserError(
                f"{checkpoint} generates from {'an image' if takes_image else 'text alone'}, not {task!r}; "
                f"--checkpoint {self.checkpoints[task]} does, and so does leaving --checkpoint out"
            )
        if self.config.get("use_meanflow"):
            raise UserError(
                f"{checkpoint} is distilled to a few steps, for which there is no training here; --checkpoint "
                f"{self.checkpoints[task]} is not"
            )
        if task == "i2v":
            self.image_components = ("image_encoder", "feature_extractor")

    @classmethod
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:
        """720p by the size that its videos have."""
        hd = base.read_config("transformer/config.json").get("target_size", 0) >= HD_SIDE
        return f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_{task}" if hd else None

    def _caption_attention(self) -> CaptionAttention:
        return UnpaddedCaptions(self.task)

    def load_text_pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline with its text encoders, and a VAE without content: it reads its number of channels."""
        pipeline = self._load_text_pipeline(dtype, vae=self.empty_vae_pipeline().vae)
        pipeline.vae = None
        pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = self.caption_lengths
        return pipeline

    def _with_tiling(self, pipeline: Any) -> Any:
        """With masks of the VAE's attention that are made at once, rather than row by row for thousands of rows."""
        for half in (pipeline.vae.encoder, pipeline.vae.decoder):
            for attention in half.mid_block.attentions:
                attention.prepare_causal_attention_mask = causal_mask
        return super()._with_tiling(pipeline)

    def for_encoded_prompts(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline with videos of the size of their first frame, which is that of the clips.

        By itself it chooses the nearest of its own sizes.
        """
        # The pipeline passes the last one by its name.
        pipeline.video_processor.calculate_default_height_width = lambda height, width, target_size: (height, width)  # noqa: ARG005
        return pipeline

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[1000, D]` of Qwen2.5-VL, and `prompt_embeds_2` `[256, D']` of ByT5.

        They are zero from `prompt_length` and `prompt_length_2` on.
        """
        embeds, mask, embeds_2, mask_2 = pipeline.encode_prompt(caption)
        encoded = {}
        for which, tensor, valid in (("", embeds[0], mask[0].bool()), ("_2", embeds_2[0], mask_2[0].bool())):
            encoded[f"prompt_embeds{which}"] = tensor * valid[:, None]
            encoded[f"prompt_length{which}"] = valid.sum().cpu()
        return encoded

    def run_text_encoders(self, encoders: Sequence[Any], tokens: int) -> None:
        """Qwen2.5-VL with the states of all its layers, of which the pipelines take one, and ByT5."""
        qwen, byt5 = encoders
        qwen(input_ids=torch.zeros(1, tokens + TEMPLATE_TOKENS, dtype=torch.int64), output_hidden_states=True)
        byt5(input_ids=torch.zeros(1, self.caption_lengths[1], dtype=torch.int64))

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """Tensors like those of `encode_prompt`."""
        tokens, glyphs = self.caption_lengths
        return {
            "prompt_embeds": torch.empty(tokens, self.config["text_embed_dim"], dtype=dtype),
            "prompt_length": torch.tensor(tokens, device="cpu"),
            "prompt_embeds_2": torch.empty(glyphs, self.config["text_embed_2_dim"], dtype=dtype),
            "prompt_length_2": torch.tensor(glyphs, device="cpu"),
        }

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, scaled, and for image to video `image_embeds` `[N, D]` of the first frame.

        The first of the latents are those of the first frame alone.
        """
        tensors = {"latents": scaled_latents(pipeline.vae, video, generator)}
        if self.image_components:
            image = pipeline.video_processor.postprocess(video[None, :, 0], output_type="pil")
            encoder = pipeline.image_encoder
            tensors["image_embeds"] = pipeline.encode_image(image[0], 1, encoder.device, encoder.dtype)[0]
        return tensors

    def empty_image_embedding(self) -> Tensors:
        """`image_embeds` `[N, D]` of a first frame, without content; SigLIP has no class token."""
        return {name: tensor[1:] for name, tensor in super().empty_image_embedding().items()}

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """The first frame's latents and a mask that says so are further channels, zero in text to video."""
        latents = batch["latents"]
        condition = torch.zeros_like(latents)
        given = torch.zeros_like(latents[:, :1])
        if self.task == "i2v":
            condition[:, :, 0] = latents[:, :, 0]
            given[:, :, 0] = 1
            image = batch["image_embeds"]
        else:
            image = latents.new_zeros(len(latents), 0, self.config["image_embed_dim"])
        hidden = self.noise_process.add_noise(latents, noise, sigmas)
        inputs = caption_inputs(
            (batch["prompt_embeds"], batch["prompt_embeds_2"]),
            (batch["prompt_length"].tolist(), batch["prompt_length_2"].tolist()),
            image,
        )
        inputs |= {"hidden_states": torch.cat([hidden, condition, given], dim=1), "timestep": sigmas * 1000}
        return TransformerStep(inputs, self.noise_process.target(latents, noise, sigmas))

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Both prompts without their padding, of which the pipelines need one token at least, and their masks."""
        arguments: dict[str, Any] = {}
        for prefix, tensors in (("", prompt), ("negative_", negative_prompt)):
            for which in ("", "_2"):
                length = int(tensors[f"prompt_length{which}"])
                embeds = tensors[f"prompt_embeds{which}"][None, : max(length, 1)]
                arguments[f"{prefix}prompt_embeds{which}"] = embeds
                arguments[f"{prefix}prompt_embeds_mask{which}"] = embeds.new_full(embeds.shape[:2], length > 0)
        return arguments

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:
        """For image to video the length alone: the image gives the size."""
        form = super().form_arguments(width=width, height=height, frames=frames, fps=fps)
        return {"num_frames": frames} if self.task == "i2v" else form
