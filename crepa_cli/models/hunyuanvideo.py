"""HunyuanVideo 1.0 (arXiv 2412.03603): text to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from crepa_cli.errors import UserError
from crepa_cli.models.family import Tensors, TransformerStep
from crepa_cli.models.hunyuan import BLOCK_NAMES, Hunyuan, mask_of
from crepa_cli.models.vae import scaled_latents

TEMPLATE_TOKENS = 95
"""Tokens of the instruction before a caption, which the pipeline cuts off after the text encoder."""
CLIP_TOKENS = 77
GUIDANCE = 6.0
"""The strength of guidance that it is given in training; the pipeline's default too."""


class HunyuanVideo(Hunyuan):
    """HunyuanVideo 1.0: blocks with two streams, for the video and its caption, and then blocks with one for both.

    An index of a block counts through both kinds. Captions are encoded by Llama, and as one vector by CLIP. It is
    distilled for guidance, whose strength is one of its inputs.
    """

    name = "hunyuanvideo"
    transformer_class = "HunyuanVideoTransformer3DModel"
    depth_settings = ("num_layers", "num_single_layers")
    pipelines = {"t2v": "HunyuanVideoPipeline"}
    checkpoints = {"t2v": "hunyuanvideo-community/HunyuanVideo"}
    # hyvideo/config.py; the pipeline's default too.
    caption_tokens = 256
    read_on_cpu = frozenset({"prompt_length"})
    architecture = "hunyuan-video"
    # Tencent-Hunyuan/HunyuanVideo-I2V: scripts/run_train_image2video_lora.sh and hyvideo/hyvae_extract/README.md; the
    # frame rate is that of HunyuanVideo's sample_video.py, the block and its weight are those of the paper on CREPA.
    settings = {
        "crepa": {"block_index": 10, "lambda": 1.0},
        "adapter": {
            "rank": 32,
            # The attention; blocks with one stream have no further output of it.
            "target_modules": [
                *("to_q", "to_k", "to_v", "to_out.0"),
                *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            ],
            "export": ["diffusers", "comfyui"],
        },
        "data": {"width": 640, "height": 352, "frames": 129, "fps": 24.0},
        "train": {"learning_rate": 1e-4, "timestep_shift": 7.0},
        "validation": {"guidance_scale": GUIDANCE},
    }
    # Its authors name no rate for all weights. This one is that of HunyuanVideo 1.5.
    full_settings = {"train": {"learning_rate": 1e-5}}
    published = {"hunyuanvideo-community/HunyuanVideo": {}}
    # Those of Tencent's checkpoint, which ComfyUI and `from_single_file` read.
    comfyui_names = {
        r"^single_transformer_blocks\b": "single_blocks",
        r"^(single_blocks\.\d+)\.(?:attn\.to_[qkv]|proj_mlp)$": r"\1.linear1",
        r"^(single_blocks\.\d+)\.proj_out$": r"\1.linear2",
        r"^(single_blocks\.\d+)\.attn\.norm_([qk])$": r"\1.\2_norm",
        r"^(single_blocks\.\d+)\.norm\.linear$": r"\1.modulation.linear",
        **BLOCK_NAMES,
        r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1$": "txt_in.t_embedder.mlp.0",
        r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2$": "txt_in.t_embedder.mlp.2",
        r"^context_embedder\.time_text_embed\.text_embedder\.": "txt_in.c_embedder.",
        r"^time_text_embed\.(time|guidance)(?:step)?_embedder\.linear_1$": r"\1_in.mlp.0",
        r"^time_text_embed\.(time|guidance)(?:step)?_embedder\.linear_2$": r"\1_in.mlp.2",
        r"^time_text_embed\.text_embedder\.linear_1$": "vector_in.in_layer",
        r"^time_text_embed\.text_embedder\.linear_2$": "vector_in.out_layer",
    }
    comfyui_joined = {**Hunyuan.comfyui_joined, "linear1": ("to_q", "to_k", "to_v", "proj_mlp")}

    def __init__(self, checkpoint: str, task: str, revision: str | None = None, variant: str | None = None) -> None:
        super().__init__(checkpoint, task, revision, variant)
        if condition := self.config.get("image_condition_type"):
            raise UserError(
                f"{checkpoint} generates from an image ({condition}), not from text alone; --checkpoint "
                f"{self.checkpoints['t2v']} does, and so does leaving --checkpoint out"
            )

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """The transformer's blocks of both kinds, in order."""
        both: Any = transformer
        return nn.ModuleList([*both.transformer_blocks, *both.single_transformer_blocks])

    def load_text_pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline with its text encoders, and with the tokenizer as it is in its file.

        The class that the published checkpoint names would split texts as the tokenizers of earlier Llamas do.
        """
        pipeline = self._load_text_pipeline(dtype, tokenizer=None)
        pipeline.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.base.fetch("tokenizer") / "tokenizer")
        return pipeline

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[256, D]` of Llama, zero from `prompt_length` on; `pooled_prompt_embeds` `[E]` of CLIP."""
        embeds, pooled, mask = pipeline.encode_prompt(caption, max_sequence_length=self.caption_tokens)
        valid = mask[0].bool()
        return {
            "prompt_embeds": embeds[0] * valid[:, None],
            "prompt_length": valid.sum().cpu(),
            "pooled_prompt_embeds": pooled[0],
        }

    def run_text_encoders(self, encoders: Sequence[Any], tokens: int) -> None:
        """Llama with the states of all its layers, of which the pipeline takes one, and CLIP."""
        llama, clip = encoders
        llama(input_ids=torch.zeros(1, tokens + TEMPLATE_TOKENS, dtype=torch.int64), output_hidden_states=True)
        clip(input_ids=torch.zeros(1, CLIP_TOKENS, dtype=torch.int64))

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """Tensors like those of `encode_prompt`."""
        return {
            "prompt_embeds": torch.empty(self.caption_tokens, self.config["text_embed_dim"], dtype=dtype),
            "prompt_length": torch.tensor(self.caption_tokens, device="cpu"),
            "pooled_prompt_embeds": torch.empty(self.config["pooled_projection_dim"], dtype=dtype),
        }

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, scaled."""
        return {"latents": scaled_latents(pipeline.vae, video, generator)}

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Captions without the padding behind the longest one, and the strength of guidance."""
        latents, embeds = batch["latents"], batch["prompt_embeds"]
        lengths = batch["prompt_length"].tolist()
        inputs = {
            "hidden_states": self.noise_process.add_noise(latents, noise, sigmas),
            "timestep": sigmas * 1000,
            "encoder_hidden_states": embeds[:, : max(lengths)],
            "encoder_attention_mask": mask_of(embeds, lengths),
            "text_lengths": lengths,
            "pooled_projections": batch["pooled_prompt_embeds"],
            "guidance": embeds.new_full((len(latents),), GUIDANCE) * 1000,
        }
        return TransformerStep(inputs, self.noise_process.target(latents, noise, sigmas))

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:  # noqa: ARG002 (see below)
        """The prompt without its padding. The negative one has no part in embedded guidance."""
        embeds = prompt["prompt_embeds"][None, : int(prompt["prompt_length"])]
        return {
            "prompt_embeds": embeds,
            "prompt_attention_mask": embeds.new_ones(embeds.shape[:2]),
            "pooled_prompt_embeds": prompt["pooled_prompt_embeds"][None],
        }
