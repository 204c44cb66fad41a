"""Facts about a run's clips, machine and base model, for its model card and exported files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from crepa_cli.files import write_whole
from crepa_cli.models.family import Family
from crepa_cli.runs.folder import RunFolder

MOST_TAGS = 100


def write_facts(run: RunFolder, family: Family, clips: Sequence[Sequence[str]], device: str) -> None:
    """Write `facts.json` into a run's folder; a run that resumes keeps the date of its start.

    Args:
        run: the folder.
        family: of the base model.
        clips: the captions of each clip.
        device: name of the device, and how many there are.
    """
    captions = [caption for clip in clips for caption in clip]
    facts = {
        "date": read_facts(run).get("date", f"{datetime.now(UTC):%Y-%m-%d}"),
        "device": device,
        "clips": len(clips),
        "license": family.base.license,
        "trigger_phrase": trigger_phrase(captions),
        "tags": dict(tag_counts(captions)),
    }
    write_whole(run.facts, json.dumps(facts, indent=2, ensure_ascii=False).encode())


def read_facts(run: RunFolder) -> dict[str, Any]:
    """The content of `facts.json`; empty for runs of versions that wrote none."""
    if not run.facts.is_file():
        return {}
    facts: dict[str, Any] = json.loads(run.facts.read_text(encoding="utf-8"))
    return facts


def trigger_phrase(captions: Sequence[str]) -> str | None:
    """The words that all captions have before their first comma; None if they differ there or are all the same."""
    first = {caption.partition(",")[0].strip() for caption in captions}
    return first.pop() if len(first) == 1 < len(set(captions)) else None


def tag_counts(captions: Sequence[str]) -> list[tuple[str, int]]:
    """The parts between commas that most captions have, and how many have them."""
    tags = Counter(tag for caption in captions for tag in dict.fromkeys(part.strip() for part in caption.split(",")))
    return sorted(tags.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS]
