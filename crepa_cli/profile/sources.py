"""Settings of one source of clips among several."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from crepa_cli.profile.table import Table, Text


class SourceSettings(Table):
    """A folder of clips or a dataset of the Hub; what it leaves open is as in `[data]`."""

    path: Text | None = Field(default=None, description="Folder of videos and images with captions, as data.path.")
    hub: Text | None = Field(
        default=None,
        description="Hub id of a dataset of videos and images with captions or metadata, in place of path.",
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of the dataset on the Hub. none: its main branch."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="How many of the clips trained on are of this source, relative to the weights of the others. none, "
        "for all sources: each clip as often as any other.",
    )
    caption_prefix: Text | None = Field(
        default=None,
        description="Words before each caption, such as a rare name to call the subject by. none: no words.",
    )
    width: int | None = Field(default=None, ge=8, description="In place of data.width.")
    height: int | None = Field(default=None, ge=8, description="In place of data.height.")
    frames: int | None = Field(default=None, ge=1, description="In place of data.frames.")

    @property
    def name(self) -> str:
        """The folder, or the dataset."""
        return str(self.path or self.hub)

    @model_serializer(mode="wrap")
    def _what_is_set(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """TOML has no null, and a list of tables is shown as it is written."""
        return {key: value for key, value in serialize(self).items() if value is not None}
