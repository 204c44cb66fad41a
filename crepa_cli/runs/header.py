"""The text in the headers of exported files, for people and for programs that manage models."""

from __future__ import annotations

import json
from pathlib import PurePath

from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.facts import read_facts
from crepa_cli.runs.folder import Exports, RunFolder


def file_header(run: RunFolder, family: Family, profile: Profile, exports: Exports) -> dict[str, str]:
    """The keys of ModelSpec 1.0.0 and those that LoRA managers read (`ss_`), as far as the run knows them.

    The alpha is the rank, as the scale of training is in the matrices.
    """
    facts = read_facts(run)
    is_lora = profile.adapter.kind == "lora"
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.architecture}/lora" if is_lora else family.architecture,
        "modelspec.title": exports.title,
        "modelspec.date": facts.get("date"),
        "modelspec.license": facts.get("license"),
        "modelspec.trigger_phrase": facts.get("trigger_phrase"),
        "ss_base_model_version": family.architecture,
        "ss_sd_model_name": family.base.shown_name,
        "ss_output_name": exports.title,
    }
    if family.expert:
        header["modelspec.timestep_range"] = ",".join(f"{sigma * 1000:g}" for sigma in family.sigma_range)
    if is_lora:
        header |= dict.fromkeys(("ss_network_dim", "ss_network_alpha"), str(profile.adapter.rank))
    if tags := facts.get("tags"):
        folder = PurePath(next((source.name for source in profile.data.all_sources), "clips")).name
        header["ss_tag_frequency"] = json.dumps({folder: tags}, ensure_ascii=False)
    return {key: value for key, value in header.items() if value is not None}
