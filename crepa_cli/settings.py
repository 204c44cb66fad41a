"""The settings of a run in the current folder, from everything that has a say in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from crepa_cli.errors import UserError
from crepa_cli.models import family_defaults
from crepa_cli.profile import Profile, ResolvedProfile, SettingsError, resolve_profile


def resolve(
    profile: str | None = None,
    flags: Mapping[str, object] | None = None,
    sets: Sequence[str] = (),
    *,
    demo: bool = False,
) -> ResolvedProfile:
    """Layer built-in defaults, the family's, `profile`, crepa.toml, the demo, `flags` and `sets`; the last one wins.

    Args:
        profile: name of a preset, or a TOML file.
        flags: values by "table.key"; None for a flag that is not given.
        sets: "table.key=value", as after `--set`.
        demo: whether the demo's settings are among the layers.

    Raises:
        SettingsError: lists all mistakes, those of the checkpoint and the clips that are named among them.
    """
    from crepa_cli.demo import demo_settings

    try:
        return resolve_profile(
            profile=profile,
            flags=flags or {},
            sets=sets,
            folder=Path(),
            family_defaults=family_defaults,
            demo=demo_settings if demo else None,
        )
    except SettingsError as error:
        if (rest := error.profile) is None:
            raise
        raise SettingsError([*error.mistakes, *_further_mistakes(rest, demo=demo)], error.rest) from None


def _further_mistakes(profile: Profile, *, demo: bool) -> list[str]:
    """Mistakes beyond the values themselves, such as a block that the checkpoint does not have."""
    from crepa_cli.demo import write_demo
    from crepa_cli.runs.checks import start_mistakes

    try:
        if demo:
            write_demo(profile)
    except UserError as error:
        return [str(error)]
    return start_mistakes(profile)
