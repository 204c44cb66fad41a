"""The model card of a run, for the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from crepa_cli.errors import counted
from crepa_cli.models.family import COMFYUI_FILE, Family
from crepa_cli.profile import Profile, dump_toml
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.folder import RunFolder


def write_model_card(run: RunFolder, family: Family, profile: Profile) -> None:
    """Write `README.md` in a run's folder: base model, how to load the weights, results and settings."""
    data = ModelCardData(
        base_model=family.base.name if not Path(family.base.name).exists() else None,
        library_name="diffusers",
        pipeline_tag="image-to-video" if family.task == "i2v" else "text-to-video",
        tags=["crepa", "video", "lora" if profile.adapter.kind == "lora" else "full-fine-tune"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run.path.name}",
        f"`{family.base.name}` ({family.name}, {family.task}), fine-tuned for {counted(profile.train.steps, 'step')} "
        "with Cross-frame Representation Alignment ([CREPA](https://arxiv.org/abs/2506.09229)).",
        f"## Use\n\n{_usage(family, profile)}",
        _results(run),
        f"## Settings\n\n```toml\n{dump_toml(profile).strip()}\n```",
    ]
    ModelCard("\n\n".join(part for part in parts if part) + "\n").save(run.card)


def loading_lines(family: Family, profile: Profile, weights: Path) -> str:
    """Instructions to load a run's weights from the current folder, as text for a terminal."""
    if _loads_in_diffusers(profile):
        return loading_code(family, profile, weights.as_posix())
    return f"ComfyUI: {weights / COMFYUI_FILE}"


def _loads_in_diffusers(profile: Profile) -> bool:
    return "diffusers" in profile.adapter.export or profile.adapter.kind == "full"


def _usage(family: Family, profile: Profile) -> str:
    lines = []
    if _loads_in_diffusers(profile):
        lines.append(f"```python\n{loading_code(family, profile)}\n```")
    if "comfyui" in profile.adapter.export:
        lines.append(f"In ComfyUI: `weights/{COMFYUI_FILE}`.")
    return "\n\n".join(lines)


def loading_code(family: Family, profile: Profile, weights: str = "weights") -> str:
    """The diffusers code that loads a run's weights, by default from inside its folder."""
    pipeline, checkpoint = family.pipeline_class, Path(family.base.name).as_posix()
    head = "import torch\n" + f"from diffusers import {pipeline}"
    if profile.adapter.kind == "full":
        return (
            f"{head}, {family.transformer_class}\n\n"
            f'transformer = {family.transformer_class}.from_pretrained("{weights}/transformer", dtype=torch.bfloat16)\n'
            f'pipeline = {pipeline}.from_pretrained(\n    "{checkpoint}", {family.component}=transformer, '
            "dtype=torch.bfloat16\n)"
        )
    arguments = "".join(f", {name}={value}" for name, value in family.lora_loading_arguments.items())
    return (
        f"{head}\n\n"
        f'pipeline = {pipeline}.from_pretrained("{checkpoint}", dtype=torch.bfloat16)\n'
        f'pipeline.load_lora_weights("{weights}", weight_name="pytorch_lora_weights.safetensors"{arguments})'
    )


def _results(run: RunFolder) -> str:
    metrics = read_metrics(run.metrics)
    if not metrics:
        return ""
    columns = ("step", "loss", "diffusion_loss", "crepa_similarity", "crepa_similarity_ema", "crepa_coefficient")
    chosen = [metrics[index] for index in sorted({part * (len(metrics) - 1) // 4 for part in range(5)})]
    rows = [[_cell(line[column]) for column in columns] for line in chosen]
    lines = [columns, ["---"] * len(columns), *rows]
    curves = f"![losses, lambda (the coefficient) and similarity over the steps]({run.curves.name})\n\n"
    return (
        "## Training\n\n"
        + (curves if run.curves.exists() else "")
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
