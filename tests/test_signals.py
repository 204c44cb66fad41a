"""Requests to stop are recorded; a second Ctrl-C does not wait."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from crepa_cli.signals import Stopped, acknowledged, stop_signals

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
WAIT = """
import sys
from crepa_cli.signals import stop_signals
with stop_signals() as signals:
    signals.at_once = False
    print("ready", flush=True)
    for _ in sys.stdin:
        print(signals.received, flush=True)
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Handlers of Python's own at first, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in STOPS[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_recorded_and_its_handler_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as signals:
        signals.at_once = False
        assert signals.received == []
        signal.raise_signal(number)
        assert signals.received == [number]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_at_once_what_has_nothing_to_save(number: signal.Signals) -> None:
    with pytest.raises(Stopped) as stopped, stop_signals():
        signal.raise_signal(number)
    assert stopped.value.number == number


def test_the_second_ctrl_c_ends_the_process_at_once() -> None:
    with pytest.raises(SystemExit) as ended, stop_signals() as signals:  # noqa: PT012
        signals.at_once = False
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_is_acknowledged_while_there_is_something_to_save() -> None:
    heard: list[int] = []
    with acknowledged(lambda: heard.append(1)), stop_signals() as signals:
        signals.at_once = False
        signal.raise_signal(signal.SIGTERM)
        assert heard == [1]
    with acknowledged(lambda: heard.append(2)), pytest.raises(Stopped), stop_signals():
        signal.raise_signal(signal.SIGTERM)
    with stop_signals() as signals:
        signals.at_once = False
        signal.raise_signal(signal.SIGTERM)
    assert heard == [1]


def test_a_launcher_may_repeat_ctrl_c_as_sigterm() -> None:
    with stop_signals() as signals:
        signals.at_once = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
    assert signals.received == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]


def test_other_threads_get_no_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[object] = []

    def work() -> None:
        with stop_signals() as signals:
            found.extend([signals.received, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[], before]


@pytest.mark.skipif(shutil.which("nohup") is None, reason="has no nohup")
@pytest.mark.parametrize(("command", "expected"), [([], "[1]"), (["nohup"], "[]")])
def test_a_closed_terminal_is_a_request_but_for_nohup(command: list[str], expected: str) -> None:
    process = subprocess.Popen(
        [*command, sys.executable, "-c", WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    told, _ = process.communicate("\n")
    assert told.strip() == expected
    assert process.returncode == 0
