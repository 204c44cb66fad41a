"""The encoder that the settings name as the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crepa_cli.hub.download import Need, fetch
from crepa_cli.hub.read import read_config
from crepa_cli.profile import CrepaSettings
from crepa_cli.teachers.dinov2 import ENCODERS, Dinov2Teacher


def load_teacher(crepa: CrepaSettings, device: torch.device) -> Dinov2Teacher:
    """Load the encoder named in the settings."""
    return Dinov2Teacher.load(encoder_folder(crepa), device)


def encoder_need(crepa: CrepaSettings) -> Need:
    """The repository or folder of the encoder."""
    return Need(ENCODERS.get(crepa.encoder, crepa.encoder), crepa.encoder_revision, ("",))


def encoder_folder(crepa: CrepaSettings) -> Path:
    """The local folder of the encoder, downloaded if necessary."""
    return fetch(encoder_need(crepa))


def encoder_config(crepa: CrepaSettings) -> dict[str, Any]:
    """The encoder's configuration, with its patch size and the width of its features."""
    need = encoder_need(crepa)
    return read_config(need.name, "config.json", need.revision)
