"""Passing the events of a run to its listeners, until it ends or is asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from crepa_cli.events import Event, Progress, TrainingStarted
from crepa_cli.signals import stop_signals

Listener = Callable[[Event], None]
StopRequest = Callable[[], bool]


def follow(
    start: Callable[[StopRequest], Generator[Event, None, object]],
    listeners: Sequence[Listener],
    should_stop: StopRequest,
) -> Event | None:
    """Pass all events to the listeners, and return the last one.

    A listener's error is raised where the event came from, so that the trainer can save a checkpoint. A signal ends
    the preparation at once: what it has stored is whole.

    Raises:
        Stopped: if a signal ended the work.
    """
    event = None
    with stop_signals() as signals:
        events = start(lambda: bool(signals.received) or should_stop())
        with closing(events):
            for event in events:
                if isinstance(event, TrainingStarted):
                    signals.at_once = False
                try:
                    for listener in listeners:
                        listener(event)
                except BaseException as error:
                    events.throw(error)
                if isinstance(event, Progress) and signals.at_once and should_stop():
                    break
        signals.raise_first()
    return event
