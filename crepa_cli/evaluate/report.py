"""The report as JSON: equal evaluations give equal bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crepa_cli.evaluate.result import Column, Evaluation, Video
from crepa_cli.measures import FACTS

DIGITS = 6


def report_json(evaluation: Evaluation, output: Path) -> str:
    """The evaluation as a JSON object with sorted keys, without dates and absolute paths.

    Args:
        evaluation: to report.
        output: its folder; the names of videos are relative to it, or to the folder that was given.
    """
    report = {
        "sampling": dict(evaluation.sampling),
        "measures": {name: asdict(FACTS[name]) for name in FACTS if name in _measures(evaluation)},
        "columns": [_column(evaluation, column) for column in evaluation.columns],
        "reference": None,
        "videos": [
            {
                "prompt": row.prompt,
                "seed": row.seed,
                "columns": {column.name: _video(column, column.videos[index], output) for column in evaluation.columns},
            }
            for index, row in enumerate(evaluation.rows)
        ],
        "settings_that_differ": evaluation.settings_that_differ,
        "notes": list(evaluation.notes),
    }
    if reference := evaluation.reference:
        report["reference"] = {
            **_summary(evaluation, reference),
            "videos": [_video(reference, video, output) for video in reference.videos],
        }
    return json.dumps(_rounded(report), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _measures(evaluation: Evaluation) -> set[str]:
    columns = [*evaluation.columns, *([evaluation.reference] if evaluation.reference else [])]
    return {name for column in columns for name in column.means}


def _summary(evaluation: Evaluation, column: Column) -> dict[str, Any]:
    return {"name": column.name, "means": column.means, "flags": evaluation.flags(column)}


def _column(evaluation: Evaluation, column: Column) -> dict[str, Any]:
    summary = _summary(evaluation, column)
    if column is evaluation.base:
        return summary
    differences = evaluation.differences[column.name]
    judged = {
        name: asdict(one) | {"verdict": one.verdict, "judgement": evaluation.judgement(column, name)}
        for name, one in differences.items()
    }
    return summary | {"differences": judged}


def _video(column: Column, video: Video, output: Path) -> dict[str, Any]:
    path = video.path
    inside = path.is_relative_to(output)
    file = path.relative_to(output).as_posix() if inside else f"{column.name}/{path.name}"
    return {
        "file": file,
        "fps": video.fps,
        "means": video.measures.values,
        "curves": {name: list(curve) for name, curve in video.measures.curves.items()},
    }


def _rounded(value: Any) -> Any:
    """The value with numbers of six digits, and lists in place of tuples."""
    match value:
        case float():
            return float(f"{value:.{DIGITS}g}")
        case dict():
            return {str(key): _rounded(one) for key, one in value.items()}
        case list() | tuple():
            return [_rounded(one) for one in value]
    return value
