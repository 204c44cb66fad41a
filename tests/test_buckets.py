"""Sizes and frame counts to which clips are resized."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepa_cli.data.buckets import Bucket, Size, bucket_sizes, fit, nearest_bucket, valid_frames

LAWS = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def test_the_sizes_of_480p() -> None:
    assert bucket_sizes(832, 480, 16) == [
        (832, 480),
        (448, 896),
        (480, 848),
        (512, 768),
        (544, 736),
        (624, 624),
        (736, 544),
        (768, 512),
        (896, 448),
    ]


@LAWS
@given(
    multiple=st.sampled_from([8, 16, 32, 64]),
    columns=st.integers(8, 40),
    rows=st.integers(8, 40),
    clip=st.tuples(*[st.integers(16, 4000)] * 2),
)
def test_sizes_are_multiples_of_about_the_same_area(
    multiple: int, columns: int, rows: int, clip: tuple[int, int]
) -> None:
    configured = Size(columns * multiple, rows * multiple)
    sizes = bucket_sizes(*configured, multiple)
    assert sizes[0] == configured
    assert len(sizes) == len(set(sizes))
    for size in sizes:
        assert size.width % multiple == size.height % multiple == 0
        assert size.width * size.height == pytest.approx(columns * rows * multiple**2, rel=0.2)
    nearest = nearest_bucket(*clip, sizes)
    wide, high = (
        max(clip[0] / clip[1], nearest.width / nearest.height),
        min(clip[0] / clip[1], nearest.width / nearest.height),
    )
    assert wide / high < 1.3 or not 1 / 2 < clip[0] / clip[1] < 2


def test_tiny_sizes_still_have_sides() -> None:
    assert all(min(size) >= 16 for size in bucket_sizes(16, 16, 16))


@pytest.mark.parametrize(
    ("clip", "size"),
    [((1920, 1080), (832, 480)), ((1080, 1920), (480, 848)), ((500, 500), (624, 624)), ((9000, 100), (896, 448))],
)
def test_a_clip_goes_to_the_nearest_aspect_ratio(clip: tuple[int, int], size: tuple[int, int]) -> None:
    assert nearest_bucket(*clip, bucket_sizes(832, 480, 16)) == size


@pytest.mark.parametrize(
    ("available", "wanted", "multiple", "frames"),
    [
        (100, 81, 4, 81),
        (80, 81, 4, 77),
        (81, 80, 4, 77),
        (24, 17, 8, 17),
        (24, 49, 8, 17),
        (5, 81, 4, 5),
        (4, 81, 4, None),
        (1, 81, 4, None),
        (1, 1, 4, 1),
        (50, 1, 8, 1),
        (0, 1, 8, None),
        (0, 81, 8, None),
    ],
)
def test_frame_counts_are_cut_to_the_nearest_valid_one(
    available: int, wanted: int, multiple: int, frames: int | None
) -> None:
    assert valid_frames(available, wanted, multiple) == frames


@LAWS
@given(available=st.integers(0, 500), wanted=st.integers(1, 200), multiple=st.integers(1, 16))
def test_no_larger_valid_count_exists(available: int, wanted: int, multiple: int) -> None:
    counts = [
        n for n in range(1, min(available, wanted) + 1) if n % multiple == 1 % multiple and (n > 1 or wanted == 1)
    ]
    if wanted == 1 or wanted > multiple:
        assert valid_frames(available, wanted, multiple) == max(counts, default=None)


def test_buckets_are_ordered_and_hashable() -> None:
    assert sorted({Bucket(17, 64, 96), Bucket(9, 96, 64), Bucket(17, 64, 96)}) == [
        Bucket(9, 96, 64),
        Bucket(17, 64, 96),
    ]


def test_how_a_clip_fits_its_size() -> None:
    assert fit(1664, 960, Size(832, 480)) == (0.5, 0)
    assert fit(400, 480, Size(800, 480)) == (2, 0.5)
    enlargement, cropped = fit(1920, 816, Size(832, 480))
    assert (enlargement, cropped) == pytest.approx((480 / 816, 1 - 832 / 480 / (1920 / 816)))
