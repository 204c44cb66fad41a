"""How to load a run's weights: code for diffusers, a folder for ComfyUI."""

from __future__ import annotations

from pathlib import Path

from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.folder import RunFolder

DIFFUSERS = "0.42"
"""The oldest version of diffusers that crepa runs with, and so the code here."""


def loading_lines(run: RunFolder, family: Family, profile: Profile) -> str:
    """Instructions to load a run's weights from the current folder, as text for a terminal."""
    lines = []
    if "diffusers" in profile.adapter.export:
        checkpoint = Path(family.base.name).as_posix()
        lines.append(loading_code(run, family, profile, checkpoint, run.path.as_posix()))
    if "comfyui" in profile.adapter.export:
        files = (str(exports.folder / exports.comfyui) for exports in run.all_exports(family))
        lines.append(f"{place_in_comfyui(profile)}: {', '.join(files)}")
    return "\n\n".join(lines)


def place_in_comfyui(profile: Profile) -> str:
    """ComfyUI and its folder for the exported file."""
    return f"ComfyUI, in models/{'loras' if profile.adapter.kind == 'lora' else 'diffusion_models'}"


def loading_code(run: RunFolder, family: Family, profile: Profile, checkpoint: str, place: str) -> str:
    """The diffusers code that loads a run's weights.

    Args:
        run: with the weights.
        family: of the base model.
        profile: the settings of the run.
        checkpoint: Hub id or folder of the base model.
        place: folder or Hub id of the run, as the code is to name it.
    """
    pipeline = family.pipeline_class
    head = "import torch\n" + f"from diffusers import {pipeline}"
    if profile.adapter.kind == "full":
        return (
            f"{head}, {family.transformer_class}\n\n"
            f"transformer = {family.transformer_class}.from_pretrained(\n"
            f'    "{place}", subfolder="weights/{run.exports(family.expert).transformer}", dtype=torch.bfloat16\n)\n'
            f'pipeline = {pipeline}.from_pretrained(\n    "{checkpoint}", {family.component}=transformer, '
            "dtype=torch.bfloat16\n)"
        )
    transformer = ""
    lines = []
    if family.base.file is not None:
        head, transformer = f"{head}, {family.transformer_class}", f"{family.component}=transformer, "
        lines.append(
            f"transformer = {family.transformer_class}.from_single_file(\n"
            f'    "{family.base.file.name}", config="{checkpoint}", subfolder="{family.component}", '
            "dtype=torch.bfloat16\n)"
        )
    lines.append(f'pipeline = {pipeline}.from_pretrained("{checkpoint}", {transformer}dtype=torch.bfloat16)')
    for one, exports in zip(family.trained.values(), run.all_exports(family), strict=True):
        arguments = "".join(f", {name}={value}" for name, value in one.lora_loading_arguments.items())
        lines.append(f'pipeline.{family.lora_loader}("{place}", weight_name="weights/{exports.diffusers}"{arguments})')
    return f"{head}\n\n" + "\n".join(lines)


def generating_code(family: Family, profile: Profile) -> str:
    """The call that generates a video in the form of the clips."""
    data, validation = profile.data, profile.validation
    form = family.form_arguments(width=data.width, height=data.height, frames=data.frames, fps=data.fps)
    prompt = validation.prompts[0] if validation.prompts else "..."
    image = 'image=load_image("first-frame.png"), ' if family.task == "i2v" else ""
    arguments = ", ".join(f"{name}={value!r}" for name, value in form.items())
    guidance = f"guidance_scale={validation.guidance_scale:g}"
    guider = f"pipeline.{family.guider}.{guidance.replace('=', ' = ')}\n" if family.guider else ""
    return (
        f"from diffusers.utils import export_to_video{', load_image' if image else ''}\n\n"
        f'pipeline.to("cuda")\n{guider}'
        f"video = pipeline(\n    {image}prompt={prompt!r}, {arguments},\n"
        f"    num_inference_steps={validation.steps},{'' if guider else f' {guidance},'}\n).frames[0]\n"
        f'export_to_video(video, "video.mp4", fps={data.fps:g})'
    )
