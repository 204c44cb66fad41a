"""The models and datasets that a run is made of: which it needs, and at which commit of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crepa_cli.data.encoder import encoder_need
from crepa_cli.hub.download import Need
from crepa_cli.hub.layout import dataset, is_commit
from crepa_cli.hub.question import resolve
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile, SourceSettings


def needs(profile: Profile, family: Family) -> list[Need]:
    """The repositories and local folders that a run reads, with the folders that it needs of each.

    An expert that is not trained is needed for validation alone.
    """
    validates = profile.validation.every > 0
    components = tuple(name for name in family.base.components if validates or name not in family.idle_components)
    base = Need(family.base.name, family.base.revision, components, family.base.extra_files)
    return [base, encoder_need(profile.crepa)] if profile.crepa.encoder_teaches else [base]


def commits(profile: Profile) -> dict[str, object]:
    """The commits of base model, encoder and datasets, by setting; the revision as it is for a local folder.

    The Hub is asked once in a run: a commit that arrives later changes nothing.

    Raises:
        UserError: if a repository does not exist, or is not on this machine and the Hub cannot be asked.
    """
    model, encoder = profile.model, encoder_need(profile.crepa)
    found: dict[str, object] = {"model.revision": _commit(model.repository, model.revision)}
    if profile.crepa.encoder_teaches:
        found["crepa.encoder_revision"] = _commit(encoder.name, encoder.revision)
    if profile.data.sources:
        found["data.sources"] = tuple(
            source if source.hub is None else _at_revision(source, resolve(dataset(source.hub), source.revision))
            for source in profile.data.sources
        )
    return found


def _at_revision(source: SourceSettings, revision: str | None) -> SourceSettings:
    return source.model_copy(update={"revision": revision})


def _commit(name: str, revision: str | None) -> str | None:
    return revision if Path(name).is_dir() else resolve(name, revision)


def at_commits(profile: Profile, found: Mapping[str, object]) -> Profile:
    """The settings with these commits, from `commits`."""
    tables: dict[str, dict[str, object]] = {}
    for setting, commit in found.items():
        table, key = setting.split(".")
        tables.setdefault(table, {})[key] = commit
    return profile.model_copy(
        update={table: getattr(profile, table).model_copy(update=keys) for table, keys in tables.items()}
    )


def keep_commits(saved: Profile, wanted: Profile) -> Profile:
    """The settings of a resumed run, which stays at its commits unless it is given others.

    Args:
        saved: the settings that the run was started with.
        wanted: those it is to be resumed with.
    """
    kept: dict[str, object] = {}
    if saved.model.repository == wanted.model.repository and not is_commit(wanted.model.revision):
        kept["model.revision"] = saved.model.revision
    if saved.crepa.encoder == wanted.crepa.encoder and not is_commit(wanted.crepa.encoder_revision):
        kept["crepa.encoder_revision"] = saved.crepa.encoder_revision
    revisions = {source.hub: source.revision for source in saved.data.sources}
    kept["data.sources"] = tuple(
        source if is_commit(source.revision) else _at_revision(source, revisions.get(source.hub, source.revision))
        for source in wanted.data.sources
    )
    return at_commits(wanted, kept)
