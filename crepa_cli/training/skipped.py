"""Steps that were skipped because a loss or gradient was not finite, and when there are too many of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class SkippedSteps:
    """Counts consecutive skipped steps, of the run and of each clip.

    One clip whose features are damaged never fails many steps in a row, but it fails every time it is drawn.

    Args:
        allowed: consecutive skipped steps that are tolerated.
        state: from `state_dict`, to resume.
    """

    def __init__(self, allowed: int, state: Mapping[str, int] | None = None) -> None:
        self.allowed = allowed
        self.counts = dict(state or {})

    def good(self, clips: Iterable[str]) -> None:
        """Record a step that was taken with these clips."""
        for name in (RUN, *clips):
            self.counts.pop(name, None)

    def bad(self, clips: Iterable[str]) -> None:
        """Record a skipped step and the clips whose micro-batches were not finite."""
        for name in (RUN, *set(clips)):
            self.counts[name] = self.counts.get(name, 0) + 1

    def excess(self) -> str | None:
        """Why there are too many, in words; None if there are not."""
        if self.counts.get(RUN, 0) > self.allowed:
            return f"{self.counts[RUN]} consecutive steps were skipped"
        clips = sorted(name for name, count in self.counts.items() if count > self.allowed)
        return f"the last {self.allowed + 1} steps with {', '.join(clips)} were skipped" if clips else None

    def state_dict(self) -> dict[str, int]:
        """JSON values to resume from."""
        return dict(self.counts)


RUN = ""
"""The name under which the steps of the run as a whole are counted."""
