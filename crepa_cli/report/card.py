"""The model card of a run, for the Hub."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from crepa_cli.errors import counted
from crepa_cli.hub.layout import is_commit
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile, SourceSettings, dump_toml
from crepa_cli.report.loading import DIFFUSERS, generating_code, loading_code, place_in_comfyui
from crepa_cli.report.metrics import read_held_out, read_metrics
from crepa_cli.report.summary import held_out_words
from crepa_cli.runs.facts import read_facts
from crepa_cli.runs.folder import RunFolder

HUB_LICENSES = {"apache-2.0", "mit", "openrail", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}


def write_model_card(run: RunFolder, family: Family, profile: Profile) -> None:
    """Write `README.md` in a run's folder: base model, samples, how to load the weights, results, clips, settings.

    It names no folder of this machine.
    """
    facts = read_facts(run)
    base = f"{family.base.shown_name}{_experts(family)}"
    parts = [
        f"---\n{_metadata(run, family, profile, facts).to_yaml()}\n---",
        f"# {run.name}",
        f"`{base}` ({family.name}, {family.task}{_commit(family)}), fine-tuned for "
        f"{counted(profile.train.steps, 'step')} with Cross-frame Representation Alignment ([CREPA](https://arxiv.org/abs/2506.09229)).",
        _samples(run, profile),
        f"## Use\n\n{_usage(run, family, profile, facts)}",
        _results(run),
        _clips_and_machine(run, profile, facts),
        f"## Settings\n\n```toml\n{dump_toml(without_folders(profile)).strip()}\n```",
    ]
    ModelCard("\n\n".join(part for part in parts if part) + "\n").save(run.card)


def _experts(family: Family) -> str:
    if family.trains_all:
        return f" ({' and '.join(family.experts)} noise experts)"
    return f" ({family.expert} noise expert)" if family.expert else ""


def _commit(family: Family) -> str:
    revision = family.base.revision
    return f", at commit `{revision}`" if is_commit(revision) else ""


def _metadata(run: RunFolder, family: Family, profile: Profile, facts: Mapping[str, Any]) -> ModelCardData:
    is_lora = profile.adapter.kind == "lora"
    kinds = ["lora", "template:diffusion-lora"] if is_lora else ["full-fine-tune"]
    published = not Path(family.base.name).exists() and family.base.file is None
    samples = zip(profile.validation.prompts, last_samples(run), strict=False)
    return ModelCardData(
        base_model=family.base.name if published else None,
        base_model_relation=("adapter" if is_lora else "finetune") if published else None,
        license=_hub_license(facts.get("license")),
        license_name=facts.get("license") if _hub_license(facts.get("license")) == "other" else None,
        library_name="diffusers",
        pipeline_tag="image-to-video" if family.task == "i2v" else "text-to-video",
        tags=["crepa", "diffusers", "diffusers-training", "video", *kinds],
        instance_prompt=facts.get("trigger_phrase"),
        widget=[{"text": text, "output": {"url": path.as_posix()}} for text, path in samples] or None,
    )


def _hub_license(name: str | None) -> str | None:
    """The identifier of a license on the Hub, which has a list of them; "other" for those that are not on it."""
    return name if name is None or name in HUB_LICENSES else "other"


def last_samples(run: RunFolder) -> list[Path]:
    """The videos of the last validation, by prompt, relative to the run's folder."""
    folders = sorted(path.parent for path in run.path.glob("samples/step-*/*.mp4"))
    return [path.relative_to(run.path) for path in sorted(folders[-1].glob("*.mp4"))] if folders else []


def _samples(run: RunFolder, profile: Profile) -> str:
    samples = list(zip(profile.validation.prompts, last_samples(run), strict=False))
    if not samples:
        return ""
    sheet = samples[0][1].parent / "sheet.png"
    picture = (
        f"![frames of the samples, below those of the base model]({sheet.as_posix()})\n\n"
        if (run.path / sheet).exists()
        else ""
    )
    return f"## Samples\n\n{picture}" + "\n".join(f"- [{text}]({path.as_posix()})" for text, path in samples)


def _clips_and_machine(run: RunFolder, profile: Profile, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    data, clips = profile.data, counted(facts["clips"], "clip")
    lines = [
        f"- {clips}, about {data.width}x{data.height}, {data.frames} frames at {data.fps:g} fps",
        f"- trained on {facts['device']}, in {profile.model.dtype}",
    ]
    if metrics := [line for line in read_metrics(run.metrics) if not line.get("skipped")]:
        seconds = statistics.median(line["step_seconds"] for line in metrics)
        peak = max(line["peak_memory_bytes"] or 0 for line in metrics) / 2**30
        lines.append(f"- {seconds:.3g} seconds per step" + (f", {peak:.1f} GiB of memory" if peak else ""))
    return "## Clips and machine\n\n" + "\n".join(lines)


def without_folders(profile: Profile) -> Profile:
    """The settings with the last part alone of every absolute path, as a card is published."""
    # Not validated: the last part alone names no encoder or folder of this machine.
    tables = {
        table: settings.model_copy(update={key: _name_alone(value) for key, value in settings})
        for table, settings in profile
    }
    return profile.model_copy(update=tables)


def _name_alone(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_name_alone(one) for one in value)
    if isinstance(value, SourceSettings):
        return value.model_copy(update={"path": _name_alone(value.path)})
    if not isinstance(value, str):
        return value
    paths = [kind(value) for kind in (PurePosixPath, PureWindowsPath)]
    return next((path.name for path in paths if path.is_absolute()), value)


def _usage(run: RunFolder, family: Family, profile: Profile, facts: Mapping[str, Any]) -> str:
    parts = []
    if trigger := facts.get("trigger_phrase"):
        parts.append(f"Every caption begins with `{trigger}`: begin the prompt with it too.")
    if "diffusers" in profile.adapter.export:
        code = loading_code(run, family, profile, family.base.shown_name, ".")
        parts.append(
            f"With diffusers {DIFFUSERS} or later, from inside this folder; on the Hub, its id stands in place of `.`:"
            f"\n\n```python\n{code}\n\n{generating_code(family, profile)}\n```"
        )
    if "comfyui" in profile.adapter.export:
        files = ", ".join(f"`weights/{exports.comfyui}`" for exports in run.all_exports(family))
        parts.append(f"{place_in_comfyui(profile)}: {files}.")
    return "\n\n".join(parts)


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
        + _held_out(run)
    )


def _held_out(run: RunFolder) -> str:
    held_out = read_held_out(run.metrics)
    if not held_out:
        return ""
    clips = counted(held_out[-1].clips, "clip")
    return f"\n\nDiffusion loss of {clips} that the training has not seen: {held_out_words(held_out)}."


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
