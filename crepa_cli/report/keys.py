"""The keys of a dashboard: actions, the range of the curves, help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

AGAIN_SECONDS = 5
"""How soon a key has to be pressed again."""
NARROWEST = 5
"""The shortest range of the curves: half of the run as many times."""


@dataclass(frozen=True)
class Action:
    """An action of a key, in words such as "stop and save", and its call.

    If it `asks`, the key has to be pressed twice, so that nothing happens by accident.
    """

    words: str
    call: Callable[[], None]
    asks: bool = True


class Keys:
    """The state of a dashboard that keys change.

    Args:
        actions: by their keys.
        clock: returns the time in seconds.

    Attributes:
        zoom: how many times the range of the curves is halved.
        help: whether the keys are explained.
    """

    def __init__(self, actions: Mapping[str, Action], clock: Callable[[], float]) -> None:
        self.actions = actions
        self.clock = clock
        self.zoom = 0
        self.help = False
        self.asked, self.asked_at = "", 0.0

    def __call__(self, key: str) -> None:
        """Do what a key stands for; every key but the one asked for takes back a question, and the help."""
        asked, helped = self._waiting(), self.help
        self.asked, self.help = "", False
        if action := self.actions.get(key):
            if key == asked or not action.asks:
                action.call()
            else:
                self.asked, self.asked_at = key, self.clock()
        elif key == "+":
            self.zoom = min(self.zoom + 1, NARROWEST)
        elif key == "-":
            self.zoom = max(self.zoom - 1, 0)
        elif key == "?":
            self.help = not helped

    @property
    def question(self) -> str:
        """The question that waits for the same key; empty if there is none."""
        key = self._waiting()
        return f"press {key} again within {AGAIN_SECONDS} s to {self.actions[key].words}" if key else ""

    def lines(self) -> list[str]:
        """The keys, one per line."""
        actions = [
            f"{key} {key}  {one.words}" if one.asks else f"{key}    {one.words}" for key, one in self.actions.items()
        ]
        return [
            *actions,
            "+    curves of the newest half of the run, a quarter, and so on",
            "-    and back",
            "?    these lines, until the next key",
        ]

    def _waiting(self) -> str:
        return self.asked if self.clock() - self.asked_at <= AGAIN_SECONDS else ""
