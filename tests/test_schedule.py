"""The coefficient over a run: its curves, its cutoffs, and resuming from a saved state."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crepa_cli.alignment import CoefficientSchedule

CURVES = {
    "constant": lambda _: 0.5,
    "linear": lambda progress: 0.1 + 0.4 * (1 - progress),
    "cosine": lambda progress: 0.1 + 0.4 * (1 + math.cos(math.pi * progress)) / 2,
    "polynomial": lambda progress: 0.1 + 0.4 * (1 - progress) ** 3,
}


@pytest.mark.parametrize("scheduler", CURVES)
@pytest.mark.parametrize("decay_steps", [0, 40])
def test_every_step_of_every_scheduler(scheduler: Any, decay_steps: int) -> None:
    schedule = CoefficientSchedule(
        peak=0.5, total_steps=100, scheduler=scheduler, end=0.1, warmup_steps=20, decay_steps=decay_steps, power=3.0
    )
    for step in range(130):
        progress = min((step - 20) / (decay_steps or 80), 1.0)
        expected = 0.5 * step / 20 if step < 20 else CURVES[scheduler](progress)
        assert schedule.coefficient(step) == pytest.approx(expected, abs=1e-15)


def test_a_cutoff_step_ends_alignment_for_good() -> None:
    schedule = CoefficientSchedule(peak=0.5, total_steps=100, cutoff_step=30)
    assert [schedule.coefficient(step) for step in (29, 30, 99)] == [0.5, 0.0, 0.0]
    assert [schedule.finished(step) for step in (29, 30, 99)] == [False, True, True]


def test_a_decay_to_zero_ends_alignment_and_one_to_a_rest_does_not() -> None:
    ends = CoefficientSchedule(peak=0.5, total_steps=100, scheduler="linear")
    rests = CoefficientSchedule(peak=0.5, total_steps=100, scheduler="linear", end=0.1)
    assert [ends.finished(step) for step in (0, 99, 100)] == [False, False, True]
    assert not rests.finished(10_000)


def test_the_average_starts_at_the_first_value_and_cuts_off_from_the_next_step() -> None:
    schedule = CoefficientSchedule(peak=0.5, total_steps=10, similarity_threshold=0.8, similarity_ema_decay=0.5)
    schedule.observe(0.6)
    assert schedule.similarity_ema == 0.6
    schedule.observe(1.0)
    assert schedule.similarity_ema == 0.8
    assert schedule.coefficient(2) == 0.0
    assert schedule.finished(2)
    schedule.observe(0.0)
    assert schedule.finished(3), "permanent"


def test_a_recoverable_cutoff_comes_back() -> None:
    schedule = CoefficientSchedule(
        peak=0.5,
        total_steps=10,
        similarity_threshold=0.8,
        similarity_ema_decay=0.0,
        threshold_mode="recoverable",
    )
    schedule.observe(0.9)
    assert schedule.coefficient(1) == 0.0
    assert not schedule.finished(1)
    schedule.observe(0.7)
    assert schedule.coefficient(2) == 0.5


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 30), st.booleans())
def test_a_restored_schedule_goes_on_as_if_never_interrupted(values: list[float], at: int, permanent: bool) -> None:
    mode: Any = "permanent" if permanent else "recoverable"
    settings: dict[str, Any] = {"peak": 1.0, "total_steps": 30, "similarity_threshold": 0.3, "threshold_mode": mode}
    whole = CoefficientSchedule(**settings)
    part = CoefficientSchedule(**settings)
    for index, value in enumerate(values):
        if index == at:
            restored = CoefficientSchedule(**settings)
            restored.load_state_dict(part.state_dict())
            part = restored
        for schedule in (whole, part):
            schedule.observe(value)
        assert part.state_dict() == whole.state_dict()
        assert part.coefficient(index + 1) == whole.coefficient(index + 1)


@pytest.mark.parametrize("scheduler", CURVES)
@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_a_schedule_that_is_0_throughout_is_finished_before_it_starts(scheduler: Any, warmup_steps: int) -> None:
    schedule = CoefficientSchedule(peak=0.0, total_steps=100, scheduler=scheduler, warmup_steps=warmup_steps)
    assert schedule.finished(0)
    assert {schedule.coefficient(step) for step in range(110)} == {0.0}


def test_a_schedule_that_rises_from_0_is_not_finished() -> None:
    schedule = CoefficientSchedule(peak=0.0, total_steps=100, scheduler="linear", end=0.2)
    assert not schedule.finished(0)
    assert schedule.coefficient(50) == pytest.approx(0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_similarity_that_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    schedule = CoefficientSchedule(peak=0.5, total_steps=10, similarity_threshold=0.8)
    schedule.observe(0.5)
    with pytest.raises(ValueError, match="similarity must be finite"):
        schedule.observe(value)
    assert schedule.state_dict() == {"similarity_ema": 0.5, "cut_off": False}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"power": 0.0}, "power"),
        ({"similarity_ema_decay": 1.0}, "similarity_ema_decay"),
        ({"warmup_steps": -1}, "step counts"),
        ({"peak": math.nan}, "peak"),
        ({"end": math.inf}, "end"),
        ({"power": math.nan}, "power"),
        ({"similarity_threshold": 85}, "similarity_threshold"),
        ({"similarity_threshold": math.nan}, "similarity_threshold"),
        ({"scheduler": "cos"}, "scheduler must be one of constant, linear, cosine, polynomial, got 'cos'"),
        ({"threshold_mode": "foo"}, "threshold_mode must be one of permanent, recoverable, got 'foo'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CoefficientSchedule(**{"peak": 0.5, "total_steps": 10, **wrong})


@pytest.mark.parametrize("wrong", [{"peak": None}, {"total_steps": "9"}, {"warmup_steps": 1.5}, {"power": [1]}])
def test_settings_that_are_no_numbers_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be a"):
        CoefficientSchedule(**{"peak": 0.5, "total_steps": 10, **wrong})
