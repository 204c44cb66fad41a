"""Names for shell completion."""

from __future__ import annotations


def family_names() -> list[str]:
    """The names of the model families."""
    from crepa_cli.models import FAMILIES

    return list(FAMILIES)


def preset_names() -> list[str]:
    """The names of the presets."""
    from crepa_cli.profile import presets

    return list(presets())
