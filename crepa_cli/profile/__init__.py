"""What a run is: its settings, the layers they come from, the presets, and the files that say so."""

from crepa_cli.profile.describe import allowed_values, description, json_schema, known_keys
from crepa_cli.profile.files import dump_toml, preset_purpose, presets
from crepa_cli.profile.layers import Defaults, ResolvedProfile, resolve_profile
from crepa_cli.profile.settings import (
    Adapter,
    Checkpoints,
    Crepa,
    Data,
    LayerSync,
    Model,
    Profile,
    Report,
    Train,
    Validation,
)

__all__ = [
    "Adapter",
    "Checkpoints",
    "Crepa",
    "Data",
    "Defaults",
    "LayerSync",
    "Model",
    "Profile",
    "Report",
    "ResolvedProfile",
    "Train",
    "Validation",
    "allowed_values",
    "description",
    "dump_toml",
    "json_schema",
    "known_keys",
    "preset_purpose",
    "presets",
    "resolve_profile",
]
