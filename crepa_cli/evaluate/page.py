"""The report as one HTML page that needs nothing else: videos, curves, script and style are in it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from crepa_cli.data.video import encoded_video
from crepa_cli.errors import counted
from crepa_cli.evaluate.result import Column, Evaluation, Video
from crepa_cli.evaluate.videos import read_video
from crepa_cli.measures import FACTS
from crepa_cli.profile.describe import shown

HERE = Path(__file__).parent
WIDTH, HEIGHT = 300, 90
"""The size of a plot of curves."""
LEAD = ("base", "steps", "guidance_scale", "width", "height", "frames", "fps", "dtype")
"""Facts of the sampling, in words."""
COLORS = 6
"""Colors of columns in page.css."""


def report_page(evaluation: Evaluation) -> str:
    """The page: measures and their differences, videos side by side, curves per frame, and the settings that differ.

    Raises:
        UserError: if a video cannot be read.
    """
    title = f"Evaluation of {', '.join(column.name for column in evaluation.others) or evaluation.base.name}"
    sections = [
        _section("Measures", _measures(evaluation)),
        _section("Settings that differ", _settings(evaluation.settings_that_differ)),
        _section("Videos", _videos(evaluation)),
        _section("What the figures mean", _definitions(evaluation)),
    ]
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_lead(evaluation)}{_flags(evaluation)}</header>\n"
        f"<main>{''.join(sections)}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def _lead(evaluation: Evaluation) -> str:
    prompts = len({row.prompt for row in evaluation.rows})
    facts = [f"{counted(len(evaluation.rows), 'video')} of {counted(prompts, 'prompt')} in each column"]
    facts += [f"{name.replace('_', ' ')} {value}" for name, value in evaluation.sampling.items() if name in LEAD]
    return f'<p class="lead">{escape("; ".join(facts))}</p>'


def _flags(evaluation: Evaluation) -> str:
    columns = [*evaluation.columns, *([evaluation.reference] if evaluation.reference else [])]
    flags = [f"<li><b>{escape(one.name)}</b>: {escape(flag)}</li>" for one in columns for flag in evaluation.flags(one)]
    notes = [f"<li>{escape(note)}</li>" for note in evaluation.notes]
    lists = {"flags": flags, "notes": notes}
    return "".join(f'<ul class="{name}">{"".join(items)}</ul>' for name, items in lists.items() if items)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{one}</th>' for one in headings)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{one}</td>" for one in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _heading(evaluation: Evaluation, column: Column) -> str:
    return f'<span class="key c{_color(evaluation, column)}"></span>{escape(column.name)}'


def _color(evaluation: Evaluation, column: Column) -> int:
    return [one.name for one in evaluation.columns].index(column.name) % COLORS


def _measures(evaluation: Evaluation) -> str:
    reference = evaluation.reference
    headings = ["", *(_heading(evaluation, column) for column in evaluation.columns)]
    headings += [escape(reference.name)] if reference else []
    rows = []
    for name in evaluation.measures:
        cells = [f"{evaluation.base.means[name]:.4f}", *(_cell(evaluation, one, name) for one in evaluation.others)]
        if reference:
            cells.append(f"{reference.means[name]:.4f}" if name in reference.means else "-")
        rows.append([escape(FACTS[name].label), *cells])
    note = "<p>Below each mean: its difference from the base, with the 95 % interval over prompts.</p>"
    return _table(headings, rows) + (note if evaluation.others else "")


def _cell(evaluation: Evaluation, column: Column, name: str) -> str:
    one = evaluation.differences[column.name][name]
    judged = evaluation.judgement(column, name)
    verdict = f"{one.verdict}{f', {judged}' if judged else ''}"
    kind = judged if judged in ("better", "worse") else "plain"
    return (
        f"{column.means[name]:.4f}<small>{one.mean:+.4f} ({one.low:+.4f} to {one.high:+.4f})</small>"
        f'<small class="{kind}">{verdict}</small>'
    )


def _settings(differing: Mapping[str, Mapping[str, object]]) -> str:
    if not differing:
        return ""
    columns = list(next(iter(differing.values())))
    rows = [[escape(name), *(escape(shown(values[one])) for one in columns)] for name, values in differing.items()]
    return _table(["", *map(escape, columns)], rows)


def _videos(evaluation: Evaluation) -> str:
    return _controls(evaluation) + "".join(_articles(evaluation))


def _controls(evaluation: Evaluation) -> str:
    fastest = max(video.fps for column in evaluation.columns for video in column.videos)
    return (
        '<div class="controls"><button id="play" type="button">Play</button>'
        f'<input id="at" type="range" min="0" max="1" value="0" step="{1 / fastest:.6g}" aria-label="Time">'
        '<output id="time"></output><label>Speed <select id="speed"><option value="0.25">1/4</option>'
        '<option value="0.5">1/2</option><option value="1" selected>1</option></select></label></div>'
    )


def _articles(evaluation: Evaluation) -> Iterator[str]:
    for index, row in enumerate(evaluation.rows):
        seed = "" if row.seed is None else f" <small>seed {row.seed}</small>"
        shown_side_by_side = [
            _figure(column.videos[index], _heading(evaluation, column)) for column in evaluation.columns
        ]
        yield (
            f'<article><h3>{escape(row.prompt)}{seed}</h3><div class="grid">{"".join(shown_side_by_side)}</div>'
            f"<details{'' if index else ' open'}><summary>Curves per frame</summary>"
            f'<div class="grid">{"".join(_plots(evaluation, index))}</div></details></article>'
        )
    if reference := evaluation.reference:
        figures = [_figure(video, escape(video.path.stem)) for video in reference.videos]
        yield f'<article><h3>{escape(reference.name)}</h3><div class="grid">{"".join(figures)}</div></article>'


def _figure(video: Video, caption: str) -> str:
    seconds = len(video.measures.curves["contrast"]) / video.fps
    data = base64.b64encode(_mp4(video.path)).decode()
    return (
        f'<figure><video muted playsinline preload="auto" data-seconds="{seconds:.6g}" data-fps="{video.fps:.6g}" '
        f'src="data:video/mp4;base64,{data}"></video><figcaption>{caption}</figcaption></figure>'
    )


def _mp4(path: Path) -> bytes:
    return path.read_bytes() if path.suffix.lower() == ".mp4" else encoded_video(*read_video(path))


def _plots(evaluation: Evaluation, index: int) -> Iterator[str]:
    """A plot of every measure of a row, with a curve for each column."""
    for name in evaluation.measures:
        curves = [column.videos[index].measures.curves[name] for column in evaluation.columns]
        frames = [len(column.videos[index].measures.curves["contrast"]) for column in evaluation.columns]
        low, high = min(map(min, curves)), max(map(max, curves))
        lines = [
            f'<polyline class="c{number % COLORS}" points="{_points(curve, count, max(frames), low, high)}"/>'
            for number, (curve, count) in enumerate(zip(curves, frames, strict=True))
        ]
        yield (
            f"<figure><figcaption>{escape(FACTS[name].label)} <small>{low:.4g} to {high:.4g}</small></figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(FACTS[name].label)} per frame">{"".join(lines)}'
            f'<line class="cursor" x1="0" x2="0" y1="0" y2="{HEIGHT}"/></svg></figure>'
        )


def _points(curve: Sequence[float], frames: int, longest: int, low: float, high: float) -> str:
    """The points of a curve; one that compares frames has no value for the first."""
    missing = frames - len(curve)
    across, up = WIDTH / max(1, longest - 1), (HEIGHT - 6) / (high - low) if high > low else 0.0
    places = [((missing + index) * across, HEIGHT - 3 - (value - low) * up) for index, value in enumerate(curve)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _definitions(evaluation: Evaluation) -> str:
    facts = [FACTS[name] for name in evaluation.measures]
    items = "".join(f"<dt>{escape(one.label)}</dt><dd>{escape(one.definition)}</dd>" for one in facts)
    return f"<p>How well a video follows its prompt is not measured.</p><dl>{items}</dl>"
