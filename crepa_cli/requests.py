"""Requests to a run that goes on: a checkpoint or a validation now."""

from __future__ import annotations

import threading


class Requests:
    """Requests to a run that trains, which the trainer serves between two optimizer steps.

    Any thread may make one. Of several processes, one is enough to make it. No request changes the weights: the run
    ends with the same bits as without.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._lock = threading.Lock()

    def checkpoint(self) -> None:
        """Ask for a checkpoint after this step, with the weights exported as with every other one."""
        self._add("checkpoint")

    def validation(self) -> None:
        """Ask for validation videos and the held-out loss after this step, as far as the run has them."""
        self._add("validation")

    @property
    def waiting(self) -> tuple[str, ...]:
        """The names of the requests that wait for the end of the step: "checkpoint", "validation"."""
        return tuple(self._names)

    def take(self) -> tuple[bool, bool]:
        """Whether a checkpoint, and whether a validation was asked for since the last call."""
        with self._lock:
            taken, self._names = self._names, []
        return "checkpoint" in taken, "validation" in taken

    def _add(self, name: str) -> None:
        with self._lock:
            if name not in self._names:
                self._names.append(name)
