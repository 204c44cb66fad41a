"""Names and values for shell completion."""

from __future__ import annotations

from pathlib import Path


def family_names() -> list[str]:
    """The names of the model families."""
    from crepa_cli.models import FAMILIES

    return list(FAMILIES)


def preset_names() -> list[str]:
    """The names of the presets."""
    from crepa_cli.profile import presets

    return list(presets())


def profile_names() -> list[str]:
    """The names of the presets and the recipes."""
    from crepa_cli.profile import presets, recipes

    return [*presets(), *recipes()]


def task_names() -> list[str]:
    """The tasks."""
    return _choices("model", "task")


def settings(incomplete: str) -> list[str]:
    """Completions for `--set`: every setting as `table.key=`, then the values of a setting that lists them."""
    from crepa_cli.profile import known_keys

    name, equals, _ = incomplete.partition("=")
    known = {f"{table}.{key}": (table, key) for table, keys in known_keys().items() for key in keys}
    if not equals:
        return [f"{setting}=" for setting in known if setting.startswith(name)]
    offered = [f"{name}={value}" for value in _choices(*known[name])] if name in known else []
    return [one for one in offered if one.startswith(incomplete)]


def json_files(incomplete: str) -> list[str]:
    """JSON files, and the folders that may hold some."""
    path = Path(incomplete)
    folder = path if incomplete.endswith("/") else path.parent
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    shown = [f"{one.as_posix()}/" if one.is_dir() else one.as_posix() for one in found]
    return [name for name in shown if name.startswith(incomplete) and name.endswith(("/", ".json"))]


def _choices(table: str, key: str) -> list[str]:
    from crepa_cli.profile.describe import listed_values

    return listed_values(table, key)
