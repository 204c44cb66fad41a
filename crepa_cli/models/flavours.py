"""Names that SimpleTuner gives base models, for importing its configurations."""

from __future__ import annotations

from collections.abc import Mapping

_FIRST_AND_LAST = "it generates from a first and a last frame, and crepa trains from text or a first frame"
_CONTROL = "it generates from control videos and masks, and crepa trains from text or a first frame"
_ONE_FILE = "its weights are single files of another repository, which crepa does not load"

FLAVOURS: dict[str, dict[str, Mapping[str, str] | str]] = {
    "wan": {
        "t2v-480p-1.3b-2.1": {"checkpoint": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
        "t2v-480p-14b-2.1": {"checkpoint": "Wan-AI/Wan2.1-T2V-14B-Diffusers"},
        "i2v-14b-2.1": {"checkpoint": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "task": "i2v"},
        "i2v-14b-2.1-720p": {"checkpoint": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "task": "i2v"},
        "i2v-14b-2.2-high": {"checkpoint": "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "task": "i2v", "variant": "high"},
        "i2v-14b-2.2-low": {"checkpoint": "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "task": "i2v", "variant": "low"},
        "ti2v-5b-2.2": {"checkpoint": "Wan-AI/Wan2.2-TI2V-5B-Diffusers"},
        "animegen-t2v-high": _ONE_FILE,
        "animegen-t2v-low": _ONE_FILE,
        "flf2v-14b-2.1": _FIRST_AND_LAST,
        "flf2v-14b-2.2-high": _FIRST_AND_LAST,
        "flf2v-14b-2.2-low": _FIRST_AND_LAST,
        "vace-1.3b-2.1": _CONTROL,
        "vace-14b-2.1": _CONTROL,
    },
    "ltxvideo": {
        "0.9.5": {"checkpoint": "Lightricks/LTX-Video-0.9.5"},
        "0.9.0": {"checkpoint": "Lightricks/LTX-Video"},
    },
    "sanavideo": {"2b-480p": {"checkpoint": "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"}},
    "kandinsky5_video": {
        "t2v-lite-sft-5s": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"},
        "t2v-lite-sft-10s": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers"},
        "t2v-lite-pretrain-5s": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Lite-pretrain-5s-Diffusers"},
        "t2v-lite-pretrain-10s": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Lite-pretrain-10s-Diffusers"},
        "t2v-pro-sft-5s-hd": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers"},
        "t2v-pro-sft-10s-hd": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-10s-Diffusers"},
        "t2v-pro-pretrain-5s-hd": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Pro-pretrain-5s-Diffusers"},
        "t2v-pro-pretrain-10s-hd": {"checkpoint": "kandinskylab/Kandinsky-5.0-T2V-Pro-pretrain-10s-Diffusers"},
        "i2v-lite-5s": {"checkpoint": "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers", "task": "i2v"},
        "i2v-pro-sft-5s": {"checkpoint": "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers", "task": "i2v"},
    },
}
"""Settings of `[model]` by family and flavour, or the reason why a flavour cannot be trained here.

The first flavour of a family is the one that SimpleTuner takes if a configuration names neither flavour nor path.
"""
