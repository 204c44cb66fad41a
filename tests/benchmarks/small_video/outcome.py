"""What the controlled experiment found: values, differences with intervals, a table and a figure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crepa_cli.measures import FACTS
from small_video.arms import ARMS, BASE
from small_video.experiment import Values

RESAMPLES = 4000
CONFIDENCE = 0.95
FEWEST_SEEDS = 3
LABELS = {
    "held_out_loss": "held-out loss",
    "direction": "direction right",
    "color": "color right",
    "way": "distance from the way",
    **{name: fact.label for name, fact in FACTS.items()},
}
"""Names of the measures in the table, in its order."""
Runs = Mapping[str, Mapping[str, Any]]
"""What `Lab.run` returned, by start, arm and seed, as in "scratch/adjacent/0"."""


class Difference(NamedTuple):
    """The mean difference from the arm without alignment, the ends of its interval, and the number of seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out 0, and is that of enough seeds."""
        return self.seeds >= FEWEST_SEEDS and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        text = f"{self.mean:+.2g} [{self.low:+.2g}, {self.high:+.2g}]"
        return f"**{text}**" if self.seen else text


class Outcome(NamedTuple):
    """An arm's mean of a measure, and its difference from the arm without alignment; None for that arm itself."""

    mean: float
    seeds: int
    difference: Difference | None


def outcomes(runs: Runs, start: str) -> dict[str, dict[str, Outcome]]:
    """Outcomes by arm and measure; differences are over the seeds that both arms have."""
    found: dict[str, dict[str, Outcome]] = {}
    base = seeds_of(runs, start, BASE)
    for arm in ARMS:
        if not (own := seeds_of(runs, start, arm)):
            continue
        shared = sorted(own.keys() & base.keys())
        found[arm] = {}
        for name in next(iter(own.values())):
            difference = None
            if arm != BASE and shared:
                difference = interval(table(own, name, shared) - table(base, name, shared))
            found[arm][name] = Outcome(float(table(own, name, sorted(own)).mean()), len(own), difference)
    return found


def seeds_of(runs: Runs, start: str, arm: str) -> dict[str, Values]:
    """The values of an arm's runs by seed."""
    prefix = f"{start}/{arm}/"
    return {key.removeprefix(prefix): run["values"] for key, run in runs.items() if key.startswith(prefix)}


def table(values: Mapping[str, Values], name: str, seeds: list[str]) -> Tensor:
    """A measure `[seeds, prompts]`."""
    return torch.tensor([values[seed][name] for seed in seeds], dtype=torch.float64)


def interval(differences: Tensor) -> Difference:
    """The mean of `[seeds, prompts]` and its percentile bootstrap interval, with both drawn anew; always the same."""
    generator = torch.Generator().manual_seed(0)
    seeds, prompts = (torch.randint(size, (RESAMPLES, size), generator=generator) for size in differences.shape)
    means = differences[seeds[:, :, None], prompts[:, None, :]].mean((1, 2))
    tail = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = means.quantile(tail).tolist()
    return Difference(float(differences.mean()), low, high, len(differences))


def as_markdown(runs: Runs, references: Mapping[str, Mapping[str, Values]]) -> str:
    """Tables of all starts: the means, then the differences from no alignment."""
    return "\n".join(line for start in references for line in _tables(runs, start, references[start]))


def _tables(runs: Runs, start: str, references: Mapping[str, Values]) -> Iterator[str]:
    found = outcomes(runs, start)
    names = [name for name in LABELS if any(name in measures for measures in found.values())]
    head = [LABELS[name] for name in names]
    yield f"### {start}: means\n"
    yield from _rows(["arm", "seeds", *head])
    for label, values in references.items():
        means = {name: torch.tensor(values[name]).mean() for name in names if name in values}
        yield _row([label, "", *(f"{means[name]:.3g}" if name in means else "" for name in names)])
    for arm, measures in found.items():
        seeds = next(iter(measures.values())).seeds
        yield _row([ARMS[arm].label, str(seeds), *(f"{measures[name].mean:.3g}" for name in names)])
    yield f"\n### {start}: differences from no alignment\n"
    yield from _rows(["arm", *head])
    for arm, measures in found.items():
        if arm != BASE:
            yield _row([ARMS[arm].label, *(str(measures[name].difference or "") for name in names)])
    yield ""


def _rows(head: list[str]) -> Iterator[str]:
    yield _row(head)
    yield _row(["---"] * len(head))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_svg(runs: Runs, starts: list[str]) -> bytes:
    """A figure with a row for each start and a chart of differences with intervals for each measure."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(LABELS)
    names = [name for name in names if any(name in run["values"] for run in runs.values())]
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "crepa", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(1.7 * len(names) + 2, 3 * len(starts)), layout="constrained")
        charts = figure.subplots(len(starts), len(names), squeeze=False, sharey="row")
        for row, start in zip(charts, starts, strict=True):
            found = {arm: one for arm, one in outcomes(runs, start).items() if arm != BASE}
            for axes, name in zip(row, names, strict=True):
                axes.axvline(0, color="gray", linewidth=0.8)
                for height, measures in enumerate(found.values()):
                    if (difference := measures[name].difference) is not None:
                        color = "tab:red" if difference.seen else "tab:gray"
                        axes.plot([difference.low, difference.high], [height, height], color=color)
                        axes.plot(difference.mean, height, "o", color=color, markersize=4)
                axes.set_yticks(range(len(found)), [ARMS[arm].label for arm in found])
                axes.set_title(f"{start}:\n{LABELS[name]}" if axes is row[0] else LABELS[name])
                axes.tick_params(axis="x", labelrotation=45)
            row[0].invert_yaxis()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
