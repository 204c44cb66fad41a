"""The order of training: complete, shuffled, and a function of the batch number alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepa_cli.data.sampler import BatchOrder

LAWS = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int]:
    """Buckets over distinct clips, batch size, repeats, seed."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
    clips = iter(range(sum(sizes)))
    batch, repeats, seed = (draw(st.integers(1, n)) for n in (5, 3, 10**6))
    return [[next(clips) for _ in range(n)] for n in sizes], batch, repeats, seed


@LAWS
@given(case=orders(), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_clip_equally_often_and_never_mixes_buckets(
    case: tuple[list[list[int]], int, int, int], epoch: int
) -> None:
    buckets, batch_size, repeats, seed = case
    order = BatchOrder(buckets, batch_size=batch_size, seed=seed, repeats=repeats)
    first = epoch * order.batches_per_epoch
    batches = [order.batch(first + i) for i in range(order.batches_per_epoch)]
    assert {order.epoch(first), order.epoch(first + order.batches_per_epoch - 1)} == {epoch}
    for batch in batches:
        assert len(batch) == batch_size
        assert any(set(batch) <= set(bucket) for bucket in buckets)
    visits = Counter(clip for batch in batches for clip in batch)
    assert set(visits) == {clip for bucket in buckets for clip in bucket}
    (often,) = set(visits.values())
    assert often % repeats == 0
    assert often <= repeats * batch_size
    if all(len(bucket) * repeats % batch_size == 0 for bucket in buckets):
        assert often == repeats


@LAWS
@given(case=orders(), batches=st.integers(1, 60))
def test_within_an_epoch_every_bucket_stays_near_its_share(
    case: tuple[list[list[int]], int, int, int], batches: int
) -> None:
    buckets, batch_size, repeats, seed = case
    order = BatchOrder(buckets, batch_size=batch_size, seed=seed, repeats=repeats)
    batches = min(batches, order.batches_per_epoch)
    drawn = Counter(order.batch(index)[0] for index in range(batches))
    clips = sum(map(len, buckets))
    for bucket in buckets:
        share = batches * len(bucket) / clips
        assert abs(sum(drawn[clip] for clip in bucket) - share) < len(buckets) + 1


@LAWS
@given(case=orders(), indices=st.lists(st.integers(0, 60), max_size=8))
def test_a_batch_depends_on_its_number_alone(case: tuple[list[list[int]], int, int, int], indices: list[int]) -> None:
    buckets, batch_size, repeats, seed = case
    order = BatchOrder(buckets, batch_size=batch_size, seed=seed, repeats=repeats)
    for index in indices:
        fresh = BatchOrder(buckets, batch_size=batch_size, seed=seed, repeats=repeats)
        assert order.batch(index) == fresh.batch(index)
    changed = order.batch(0)
    changed.clear()
    assert order.batch(0)


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder([range(100), [100]], batch_size=4, seed=1)
    epochs = [[order.batch(epoch * 101 + i) for i in range(101)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert BatchOrder([range(100), [100]], batch_size=4, seed=2).batch(0) != order.batch(0)


def test_one_odd_clip_among_twenty_is_not_seen_more_often_than_the_others() -> None:
    order = BatchOrder([range(20), [20]], batch_size=4, seed=0)
    assert order.batches_per_epoch == 21
    visits = Counter(clip for index in range(21) for clip in order.batch(index))
    assert visits == dict.fromkeys(range(21), 4)


def test_repeats_come_round_by_round() -> None:
    order = BatchOrder([range(6)], batch_size=6, seed=0, repeats=3)
    assert [sorted(order.batch(i)) for i in range(3)] == [list(range(6))] * 3


def test_the_order_is_the_same_with_every_version_of_python() -> None:
    order = BatchOrder([range(5), range(5, 9)], batch_size=2, seed=42)
    assert [order.batch(i) for i in range(9)] == [
        [2, 0],
        [6, 7],
        [3, 4],
        [8, 5],
        [1, 2],
        [7, 5],
        [3, 0],
        [6, 8],
        [1, 4],
    ]


def test_no_clips_is_an_error() -> None:
    with pytest.raises(ValueError, match="no clip"):
        BatchOrder([[], []], batch_size=1, seed=0)
