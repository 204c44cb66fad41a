"""The order of training: complete, shuffled, and a function of the batch number alone."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crepa_cli.data.sampler import BatchOrder
from crepa_cli.data.shares import Share, shares
from crepa_cli.errors import UserError

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


@LAWS
@given(
    counts=st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=3), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.3, 1.0, 2.0, 7.0]), min_size=3, max_size=3),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_sources_have_their_shares_within_two_percent_of_a_thousand_batches(
    counts: list[list[int]], weights: list[float], batch_size: int, seed: int
) -> None:
    """`counts` are the clips of each source in each bucket."""
    sources = [source for bucket in counts for source, count in enumerate(bucket) for _ in range(count)]
    assume(sources)
    clips = iter(range(len(sources)))
    buckets = [[next(clips) for _ in range(sum(bucket))] for bucket in counts]
    order = BatchOrder(buckets, batch_size=batch_size, seed=seed, shares=shares(dict(enumerate(sources)), weights, 1))
    batches = [order.batch(index) for index in range(1000)]
    drawn = Counter(sources[clip] for batch in batches for clip in batch)
    total = sum(weights[source] for source in set(sources))
    for source in set(sources):
        assert abs(drawn[source] / (1000 * batch_size) - weights[source] / total) < 0.02
    for batch in batches:
        assert len(batch) == batch_size
        assert any(set(batch) <= set(bucket) for bucket in buckets)


def test_few_clips_beside_very_many_have_their_share_from_the_first_steps_on() -> None:
    sources = [0] * 50_000 + [1] * 20
    order = BatchOrder(
        [range(len(sources))], batch_size=1, seed=3, shares=shares(dict(enumerate(sources)), [0.7, 0.3], 1)
    )
    for first in (0, 10_000):
        drawn = sum(sources[order.batch(first + index)[0]] for index in range(1000))
        assert abs(drawn / 1000 - 0.3) < 0.006


def test_sources_of_one_weight_per_clip_are_visited_equally_often_and_others_in_the_nearest_ratio() -> None:
    assert shares({5: 0, 7: 1, 9: 1}, [1.0, 2.0], 3) == [Share({5}, 3), Share({7, 9}, 3)]
    assert shares({5: 0, 7: 1, 9: 1}, [3.0, 2.0], 1) == [Share({5}, 3), Share({7, 9}, 1)]
    assert shares({0: 0, 1: 1}, [1.0, 2.5], 2) == [Share({0}, 4), Share({1}, 10)]
    assert shares({0: 0, 1: 1}, [None, None], 2) == [Share({0, 1}, 2)]
    with pytest.raises(UserError, match="weights are too far apart"):
        shares({0: 0, 1: 1}, [1e-9, 1.0], 1)


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
