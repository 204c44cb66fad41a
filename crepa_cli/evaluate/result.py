"""An evaluation: columns of videos for the same prompts, with their measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from crepa_cli.measures import FACTS, Difference, Measures, compare, washed_out

PRICES = {
    "temporal_flickering": "motion",
    "dinov2_consistency": "motion",
    "warping_error": "motion",
    "stripes": "contrast",
}
"""Measures that improve by themselves when another falls: a still picture is perfectly steady."""


@dataclass(frozen=True)
class Row:
    """A prompt and the seed of its noise; of videos from a folder, the name of the file alone."""

    prompt: str
    seed: int | None = None


@dataclass(frozen=True)
class Video:
    """A video file, its frames per second, and its measures."""

    path: Path
    fps: float
    measures: Measures


@dataclass(frozen=True)
class Column:
    """The videos of one model or folder, one for each row, and by "table.key" the settings of the run, if it is one."""

    name: str
    videos: tuple[Video, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """The mean over the videos of every measure that all of them have, in the order of `FACTS`."""
        values = [video.measures.values for video in self.videos]
        return {name: fmean(one[name] for one in values) for name in FACTS if all(name in one for one in values)}


@dataclass(frozen=True)
class Evaluation:
    """The base and others for the same rows.

    Attributes:
        rows: one for each video of a column.
        base: the column that the others are compared with.
        others: the columns of trained weights.
        reference: the training clips, whose videos belong to no row; None without any.
        sampling: how the videos were made, by name.
        notes: what is left out, and why.
    """

    rows: tuple[Row, ...]
    base: Column
    others: tuple[Column, ...]
    reference: Column | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[Column, ...]:
        """The base and the others."""
        return (self.base, *self.others)

    @property
    def measures(self) -> list[str]:
        """The measures that all columns have, in the order of `FACTS`."""
        return [name for name in FACTS if all(name in column.means for column in self.columns)]

    @cached_property
    def differences(self) -> Mapping[str, Mapping[str, Difference]]:
        """How each of the others differs from the base, by its name and the measure's."""
        base = self._by_prompt(self.base)
        return {column.name: compare(base, self._by_prompt(column)) for column in self.others}

    def _by_prompt(self, column: Column) -> list[Measures]:
        """The measures of each prompt's videos as if they were one video: intervals are over prompts, not seeds."""
        joined: dict[str, dict[str, tuple[float, ...]]] = {}
        for row, video in zip(self.rows, column.videos, strict=True):
            curves = joined.setdefault(row.prompt, {})
            for name in self.measures:
                curves[name] = (*curves.get(name, ()), *video.measures.curves[name])
        return [Measures(curves) for curves in joined.values()]

    def judgement(self, column: Column, name: str) -> str:
        """Whether a column is `better` or `worse` than the base in a measure; `with less motion` is no merit.

        It is empty if no difference is seen, or the measure has no better direction.
        """
        differences, better = self.differences[column.name], FACTS[name].better
        verdict = differences[name].verdict
        if better is None or verdict not in ("higher", "lower"):
            return ""
        if verdict != better:
            return "worse"
        price = PRICES.get(name)
        return f"with less {price}" if price and differences[price].verdict == "lower" else "better"

    def flags(self, column: Column) -> list[str]:
        """Reasons why the other figures of a column are worthless: no motion, or washed-out colors."""
        pairs = zip(self.base.videos, column.videos, strict=False)
        lost = [washed_out(base.measures, video.measures) for base, video in pairs]
        found = {
            "no motion": [video.measures.still for video in column.videos],
            "washed out (saturation)": ["saturation" in one for one in lost],
            "washed out (contrast)": ["contrast" in one for one in lost],
        }
        compared = column in self.others
        return [
            f"{flag} in {sum(which)} of {len(which)} videos"
            for flag, which in found.items()
            if any(which) and (compared or flag == "no motion")
        ]

    @property
    def settings_that_differ(self) -> dict[str, dict[str, object]]:
        """The values by column of every setting in which the runs differ."""
        runs = [column for column in self.others if column.settings]
        names = dict.fromkeys(name for column in runs for name in column.settings)
        table = {name: {column.name: column.settings.get(name) for column in runs} for name in names}
        return {name: values for name, values in table.items() if _differ(list(values.values()))}


def _differ(values: Sequence[object]) -> bool:
    return any(value != values[0] for value in values)
