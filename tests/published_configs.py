"""Facts from the configurations of published checkpoints, and the clips that these accept."""

from __future__ import annotations

from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """Facts about a checkpoint.

    `clip` has the shapes of a small clip's tensors, as the family's preparation stores them.
    """

    task: str
    blocks: int
    hidden_size: int
    frame_multiple: int
    size_multiple: int
    clip: Shapes


LTX_CLIP: Shapes = {"latents": (128, 3, 2, 4), "prompt_embeds": (8, 4096), "prompt_attention_mask": (8,)}
SANA_PROMPT: Shapes = {"prompt_embeds": (300, 2304), "prompt_attention_mask": (300,)}
WAN_PROMPT: Shapes = {"prompt_embeds": (512, 4096)}
WAN_FIRST_FRAME: Shapes = {"condition": (20, 3, 4, 8)}
COG_PROMPT: Shapes = {"prompt_embeds": (226, 4096)}
KANDINSKY_CLIP: Shapes = {"latents": (16, 3, 4, 8), "prompt_embeds": (512, 3584), "pooled_embeds": (768,)}
HUNYUAN15_CLIP: Shapes = {"latents": (32, 3, 2, 4), "prompt_embeds": (1000, 3584), "prompt_embeds_2": (256, 1472)}
HUNYUAN_CLIP: Shapes = {"latents": (16, 3, 4, 8), "prompt_embeds": (256, 4096), "pooled_prompt_embeds": (768,)}


def wan(task: str, blocks: int, hidden_size: int, clip: Shapes) -> Published:
    """Facts about Wan 2.1 and Wan 2.2 A14B, which have the same VAE."""
    return Published(task, blocks, hidden_size, 4, 16, {"latents": (16, 3, 4, 8)} | WAN_PROMPT | clip)


def ltx2_clip(video: int, audio: int) -> Shapes:
    """The shapes of a clip of LTX-2, whose caption has this width for the video and for the audio."""
    return LTX_CLIP | {"prompt_embeds": (8, video), "audio_prompt_embeds": (8, audio)}


PUBLISHED: dict[tuple[str, str], Published] = {
    ("ltxvideo", "Lightricks/LTX-Video"): Published("t2v", 28, 2048, 8, 32, LTX_CLIP),
    ("ltxvideo", "Lightricks/LTX-Video-0.9.5"): Published("t2v", 28, 2048, 8, 32, LTX_CLIP),
    ("ltxvideo", "Lightricks/LTX-Video-0.9.7-dev"): Published("i2v", 48, 4096, 8, 32, LTX_CLIP),
    ("ltx2", "Lightricks/LTX-2"): Published("t2v", 48, 4096, 8, 32, ltx2_clip(3840, 3840)),
    ("ltx2", "diffusers/LTX-2.3-Diffusers"): Published("i2v", 48, 4096, 8, 32, ltx2_clip(4096, 2048)),
    ("sanavideo", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"): Published(
        "i2v", 20, 2240, 4, 32, {"latents": (16, 3, 4, 8)} | SANA_PROMPT
    ),
    ("sanavideo", "Efficient-Large-Model/SANA-Video_2B_720p_diffusers"): Published(
        "t2v", 20, 2240, 8, 32, {"latents": (128, 3, 2, 4)} | SANA_PROMPT
    ),
    ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"): wan("t2v", 30, 1536, {}),
    ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"): wan("t2v", 40, 5120, {}),
    ("wan", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"): wan(
        "i2v", 40, 5120, WAN_FIRST_FRAME | {"image_embeds": (257, 1280)}
    ),
    ("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"): wan("t2v", 40, 5120, {}),
    ("wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"): wan("i2v", 40, 5120, WAN_FIRST_FRAME),
    ("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"): Published(
        "i2v", 30, 3072, 4, 32, {"latents": (48, 3, 2, 4)} | WAN_PROMPT
    ),
    ("kandinsky5_video", "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"): Published(
        "t2v", 32, 1792, 4, 16, KANDINSKY_CLIP
    ),
    ("kandinsky5_video", "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers"): Published(
        "i2v", 32, 1792, 4, 16, KANDINSKY_CLIP | {"first_frame": (16, 1, 4, 8)}
    ),
    ("kandinsky5_video", "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"): Published(
        "i2v", 60, 4096, 4, 16, KANDINSKY_CLIP | {"first_frame": (16, 1, 4, 8)}
    ),
    ("kandinsky6", "kandinskylab/Kandinsky-6.0-Lite-5s-Diffusers"): Published(
        "i2v", 32, 1792, 4, 16, KANDINSKY_CLIP | {"first_frame": (16, 1, 4, 8)}
    ),
    **{
        ("hunyuanvideo15", f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}_{task}"): Published(
            task, 54, 2048, 4, 16, HUNYUAN15_CLIP | ({"image_embeds": (729, 1152)} if task == "i2v" else {})
        )
        for size in ("480p", "720p")
        for task in ("t2v", "i2v")
    },
    ("hunyuanvideo", "hunyuanvideo-community/HunyuanVideo"): Published("t2v", 60, 3072, 4, 16, HUNYUAN_CLIP),
    ("cogvideox", "zai-org/CogVideoX-2b"): Published("t2v", 30, 1920, 8, 16, {"latents": (16, 3, 4, 8)} | COG_PROMPT),
    ("cogvideox", "zai-org/CogVideoX-5b"): Published("t2v", 42, 3072, 8, 16, {"latents": (16, 3, 4, 8)} | COG_PROMPT),
    ("cogvideox", "zai-org/CogVideoX-5b-I2V"): Published(
        "i2v", 42, 3072, 8, 16, {"latents": (16, 3, 60, 90), "first_frame": (16, 1, 60, 90)} | COG_PROMPT
    ),
    ("cogvideox", "zai-org/CogVideoX1.5-5B"): Published(
        "t2v", 42, 3072, 8, 16, {"latents": (16, 4, 4, 8)} | COG_PROMPT
    ),
    ("cogvideox", "zai-org/CogVideoX1.5-5B-I2V"): Published(
        "i2v", 42, 3072, 8, 16, {"latents": (16, 4, 4, 8), "first_frame": (16, 1, 4, 8)} | COG_PROMPT
    ),
}
