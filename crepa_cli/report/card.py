"""The model card of a run, for the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from crepa_cli.models.family import Family
from crepa_cli.profile import Profile, dump_toml
from crepa_cli.report.metrics import read_metrics


def write_model_card(output: Path, family: Family, profile: Profile) -> Path:
    """Write `README.md` into a run's folder: base model, how to load the weights, results and settings."""
    data = ModelCardData(
        base_model=family.checkpoint if not Path(family.checkpoint).exists() else None,
        library_name="diffusers",
        pipeline_tag="image-to-video" if family.task == "i2v" else "text-to-video",
        tags=["crepa", "video", "lora" if profile.adapter.kind == "lora" else "full-fine-tune"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {output.name}",
        f"`{family.checkpoint}` ({family.name}, {family.task}), fine-tuned for {profile.train.steps} steps with "
        "Cross-frame Representation Alignment ([CREPA](https://arxiv.org/abs/2506.09229)).",
        f"## Use\n\n```python\n{loading_code(family, profile)}\n```",
        _results(output),
        f"## Settings\n\n```toml\n{dump_toml(profile).strip()}\n```",
    ]
    path = output / "README.md"
    ModelCard("\n\n".join(part for part in parts if part) + "\n").save(path)
    return path


def loading_code(family: Family, profile: Profile) -> str:
    """The lines of diffusers that load the weights of a run from inside its folder."""
    pipeline = family.pipelines[family.task]
    head = "import torch\n" + f"from diffusers import {pipeline}"
    if profile.adapter.kind == "full":
        return (
            f"{head}, {family.transformer_class}\n\n"
            f'transformer = {family.transformer_class}.from_pretrained("weights/transformer", dtype=torch.bfloat16)\n'
            f'pipeline = {pipeline}.from_pretrained(\n    "{family.checkpoint}", transformer=transformer, '
            "dtype=torch.bfloat16\n)"
        )
    return (
        f"{head}\n\n"
        f'pipeline = {pipeline}.from_pretrained("{family.checkpoint}", dtype=torch.bfloat16)\n'
        'pipeline.load_lora_weights("weights", weight_name="pytorch_lora_weights.safetensors")'
    )


def _results(output: Path) -> str:
    metrics = read_metrics(output / "metrics.jsonl")
    if not metrics:
        return ""
    columns = ("step", "loss", "diffusion_loss", "crepa_similarity", "crepa_similarity_ema", "crepa_coefficient")
    chosen = [metrics[index * (len(metrics) - 1) // 4] for index in range(5)]
    rows = [[_cell(line[column]) for column in columns] for line in chosen]
    lines = [columns, ["---"] * len(columns), *rows]
    return "## Training\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
