"""The sources of a run's clips: folders and datasets, each with a form and captions of its own."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from crepa_cli.data.clips import CAPTION_SUFFIX, CLIP_SUFFIXES, METADATA_NAMES, Clip, clips_folder, find_clips
from crepa_cli.data.index import Index
from crepa_cli.data.scan import ClipForm, PreparedClip, scan
from crepa_cli.data.windows import Sampling
from crepa_cli.events import Event
from crepa_cli.hub import layout
from crepa_cli.hub.download import Need
from crepa_cli.hub.question import resolve
from crepa_cli.models.family import Family
from crepa_cli.profile import DataSettings, SourceSettings


def dataset_needs(data: DataSettings) -> list[Need]:
    """The datasets of the Hub, of which videos, images, captions and metadata are needed and nothing else."""
    kinds = (*CLIP_SUFFIXES, CAPTION_SUFFIX, *METADATA_NAMES)
    return [
        Need(layout.dataset(source.hub), source.revision, (), kinds=kinds)
        for source in data.all_sources
        if source.hub is not None
    ]


def source_folder(source: SourceSettings) -> Path:
    """The folder of a source; that of a dataset is in the Hub's cache, once it has been downloaded.

    Raises:
        UserError: if the commit of a dataset is not known and the Hub cannot be asked.
    """
    if source.hub is None:
        return Path(source.name)
    name = layout.dataset(source.hub)
    return layout.snapshot(name, resolve(name, source.revision))


def source_form(data: DataSettings, source: SourceSettings) -> ClipForm:
    """The form of the clips of a source."""
    own = {key: getattr(source, key) for key in ("width", "height", "frames")}
    return ClipForm.of(data)._replace(**{key: value for key, value in own.items() if value is not None})


def forms(data: DataSettings) -> list[ClipForm]:
    """The form of each source; without any, that of the settings alone."""
    return [source_form(data, source) for source in data.all_sources] or [ClipForm.of(data)]


def largest_form(data: DataSettings) -> ClipForm:
    """The form of the source whose clips have the most pixels."""
    return max(forms(data), key=lambda form: form.width * form.height * form.frames)


def scan_sources(
    family: Family, data: DataSettings, index: Index | None = None
) -> Generator[Event, None, list[PreparedClip]]:
    """Find the clips of all sources; see `scan`.

    Raises:
        UserError: if the settings name no source, or one does not exist or has no usable clips.
    """
    clips_folder(data)
    clips: list[PreparedClip] = []
    for number, source in enumerate(data.all_sources):
        found = yield from scan(
            *(family, source_folder(source), source_form(data, source), index, Sampling.of(data)),
            caption_lines=data.caption_lines,
        )
        clips += [replace(clip, clip=_with_prefix(clip.clip, source), source=number) for clip in found]
    return clips


def clips_here(data: DataSettings) -> list[Clip]:
    """The clips of all sources with the captions that are trained, without looking into them.

    Raises:
        UserError: if a source is not on this machine, or has none.
    """
    return [
        _with_prefix(clip, source)
        for source in data.all_sources
        for clip in find_clips(source_folder(source), caption_lines=data.caption_lines).clips
    ]


def _with_prefix(clip: Clip, source: SourceSettings) -> Clip:
    if source.caption_prefix is None:
        return clip
    return Clip(clip.path, tuple(f"{source.caption_prefix.strip()} {caption}" for caption in clip.captions))
