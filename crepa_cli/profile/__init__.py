"""The settings of a run: their layers, the presets, and the TOML files that hold them."""

from crepa_cli.profile.alignment import CrepaSettings, LayerSyncSettings, step_count
from crepa_cli.profile.describe import allowed_values, description, json_schema, known_keys
from crepa_cli.profile.files import dump_toml, preset_purpose, presets, recipes
from crepa_cli.profile.layers import Defaults, ResolvedProfile, SettingsError, resolve_profile
from crepa_cli.profile.model import MemorySettings, ModelSettings
from crepa_cli.profile.settings import (
    AdapterSettings,
    CheckpointsSettings,
    DataSettings,
    FeatureDtype,
    Profile,
    ReportSettings,
    TrainSettings,
    ValidationSettings,
)
from crepa_cli.profile.sources import SourceSettings

__all__ = [
    "AdapterSettings",
    "CheckpointsSettings",
    "CrepaSettings",
    "DataSettings",
    "Defaults",
    "FeatureDtype",
    "LayerSyncSettings",
    "MemorySettings",
    "ModelSettings",
    "Profile",
    "ReportSettings",
    "ResolvedProfile",
    "SettingsError",
    "SourceSettings",
    "TrainSettings",
    "ValidationSettings",
    "allowed_values",
    "description",
    "dump_toml",
    "json_schema",
    "known_keys",
    "preset_purpose",
    "presets",
    "recipes",
    "resolve_profile",
    "step_count",
]
