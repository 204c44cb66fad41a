"""The measures of videos against plain float64 references, and on videos of which the answer is known."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crepa_cli.errors import UserError
from crepa_cli.measures import FACTS, Measures, compare, measure, washed_out
from crepa_cli.measures.raft import Raft
from crepa_cli.measures.warping import warped, warping_error

FRAMES, HEIGHT, WIDTH = 8, 48, 64
SHIFT = 2
STEADINESS = ("temporal_flickering", "dinov2_consistency", "warping_error")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed))


def moving_scene() -> Tensor:
    """A textured picture that moves `SHIFT` pixels to the right in every frame: `[F, 3, H, W]`."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) / 16, torch.arange(-FRAMES * SHIFT, WIDTH) / 16, indexing="ij")
    waves = [torch.sin(2.1 * x + y), torch.sin(x * y), torch.cos(1.3 * x - 2 * y)]
    picture = torch.stack([0.5 + 0.4 * wave for wave in waves])
    return torch.stack([picture[..., start : start + WIDTH] for start in range(FRAMES * SHIFT, 0, -SHIFT)])


def known_flow(first: Tensor, second: Tensor) -> Tensor:
    """The best of the flows to the left and to the right by at most 3 pixels."""

    def difference(shift: int) -> float:
        here, there = first[..., 3:-3], second[..., 3 + shift : second.shape[-1] - 3 + shift]
        return float((here - there).abs().mean())

    best = min(range(-3, 4), key=difference)
    return torch.stack([torch.full((HEIGHT, WIDTH), float(best)), torch.zeros(HEIGHT, WIDTH)])


def thumbnails(video: Tensor) -> Tensor:
    """Features that change with what is where."""
    return nn.functional.adaptive_avg_pool2d(video, (6, 8)).flatten(1) - 0.5


def figures(video: Tensor) -> Measures:
    return measure(video, thumbnails, known_flow)


def brightness(frame: np.ndarray) -> np.ndarray:
    return 0.2126 * frame[0] + 0.7152 * frame[1] + 0.0722 * frame[2]


def reference_flickering(video: np.ndarray) -> float:
    return float(np.mean([1 - np.abs(video[i + 1] - video[i]).mean() for i in range(len(video) - 1)]))


def reference_saturation(video: np.ndarray) -> float:
    pixels = np.moveaxis(video, 1, -1).reshape(-1, 3)
    return float(np.mean([max(pixel) - min(pixel) for pixel in pixels]))


def reference_contrast(video: np.ndarray) -> float:
    return float(np.mean([math.sqrt(((b := brightness(frame)) ** 2).mean() - b.mean() ** 2) for frame in video]))


def reference_stripes(video: np.ndarray) -> float:
    found = []
    for frame in video:
        energy = 0.0
        for means in (brightness(frame).mean(0), brightness(frame).mean(1)):
            narrow = [means[i] - sum(means[i - 8 : i + 9]) / 17 for i in range(8, len(means) - 8)]
            energy += sum(value**2 for value in narrow) / len(narrow)
        found.append(math.sqrt(energy))
    return float(np.mean(found))


def reference_motion(video: np.ndarray) -> float:
    found = []
    for first, second in itertools.pairwise(video):
        change = brightness(second) - brightness(first)
        cells = [
            change[row : row + 2, column : column + 2].mean()
            for row in range(0, change.shape[0] - 1, 2)
            for column in range(0, change.shape[1] - 1, 2)
        ]
        mean = sum(cells) / len(cells)
        lengths = sorted(abs(cell - mean) for cell in cells)
        top = lengths[-(len(lengths) // 20) :]
        found.append(sum(top) / len(top))
    return float(np.mean(found))


def reference_consistency(features: np.ndarray) -> float:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    frames = [frame.reshape(-1, frame.shape[-1]).mean(0) for frame in features]
    both = [(cosine(frames[i], frames[i - 1]) + cosine(frames[i], frames[0])) / 2 for i in range(1, len(frames))]
    return sum(both) / len(both)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("temporal_flickering", reference_flickering),
        ("saturation", reference_saturation),
        ("contrast", reference_contrast),
        ("stripes", reference_stripes),
        ("motion", reference_motion),
    ],
)
def test_figures_of_pixels_equal_plain_references(name: str, reference: Callable[[np.ndarray], float]) -> None:
    video = noise(2, 3, 129, 134)
    assert measure(video).values[name] == pytest.approx(reference(video.double().numpy()), rel=1e-10)


def test_consistency_equals_a_plain_reference() -> None:
    video, features = noise(5, 3, 8, 8), noise(5, 2, 3, 7, seed=1) - 0.4
    found = measure(video, lambda _: features).values["dinov2_consistency"]
    assert found == pytest.approx(reference_consistency(features.double().numpy()), rel=1e-10)


def reference_read(picture: np.ndarray, x: float, y: float) -> float:
    """Bilinear interpolation inside a picture `[H, W]`."""
    left, top = min(int(x), picture.shape[1] - 2), min(int(y), picture.shape[0] - 2)
    across, along = x - left, y - top
    upper = picture[top, left] * (1 - across) + picture[top, left + 1] * across
    lower = picture[top + 1, left] * (1 - across) + picture[top + 1, left + 1] * across
    return float(upper * (1 - along) + lower * along)


def test_warping_error_and_motion_along_the_flow_equal_plain_references() -> None:
    first, second, height, width = noise(3, 9, 11), noise(3, 9, 11, seed=1), 9, 11
    forward, backward = 3 * noise(2, 9, 11, seed=2) - 1, 3 * noise(2, 9, 11, seed=3) - 2
    a, b, there, back = (tensor.double().numpy() for tensor in (first, second, forward, backward))
    errors = []
    for row in range(height):
        for column in range(width):
            x, y = column + there[0, row, column], row + there[1, row, column]
            if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
                continue
            way, home = there[:, row, column], np.array([reference_read(back[i], x, y) for i in (0, 1)])
            if ((way + home) ** 2).sum() <= 0.01 * ((way**2).sum() + (home**2).sum()) + 0.5:
                errors += [(a[i, row, column] - reference_read(b[i], x, y)) ** 2 for i in range(3)]
    assert 0 < len(errors) < 3 * height * width
    flows = iter([forward, backward])
    found = measure(torch.stack([first, second]), flow=lambda *_: next(flows)).values
    assert found["warping_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-9)
    lengths = sorted(np.hypot(there[0], there[1]).ravel())
    assert found["flow_motion"] == pytest.approx(sum(lengths[-4:]) / 4 / 9, rel=1e-9)


def test_warping_along_a_known_flow_undoes_the_motion() -> None:
    video = moving_scene()
    flow = torch.stack([torch.full((HEIGHT, WIDTH), float(SHIFT)), torch.zeros(HEIGHT, WIDTH)])
    back, inside = warped(video[1], flow)
    torch.testing.assert_close(back[:, inside], video[0].double()[:, inside], atol=1e-12, rtol=0)
    assert int((~inside).sum()) == HEIGHT * SHIFT
    assert warping_error(video[0], video[1], flow, -flow) < 1e-24
    assert warping_error(video[0], video[1], -flow, flow) > 1e-3
    # Half a pixel along a ramp is exact by interpolation.
    ramp = (torch.arange(WIDTH) / WIDTH).expand(3, HEIGHT, WIDTH)
    moved, inside = warped(ramp, torch.full((2, HEIGHT, WIDTH), 0.5))
    torch.testing.assert_close(moved[:, inside], (ramp.double() + 0.5 / WIDTH)[:, inside])


def test_every_measure_has_its_facts() -> None:
    assert set(figures(moving_scene()).values) == set(FACTS)


def test_curves_belong_to_frames_and_values_are_their_means() -> None:
    found = figures(moving_scene())
    for name, curve in found.curves.items():
        assert len(curve) == FRAMES - (name not in ("saturation", "contrast", "stripes"))
        assert found.values[name] == pytest.approx(sum(curve) / len(curve))


def test_a_still_video_is_perfectly_steady_and_flagged() -> None:
    scene = moving_scene()
    still = figures(scene[:1].repeat(FRAMES, 1, 1, 1))
    assert still.values["temporal_flickering"] == 1
    assert still.values["dinov2_consistency"] == pytest.approx(1, abs=1e-12)
    assert still.values["motion"] == still.values["flow_motion"] == 0
    assert still.values["warping_error"] == pytest.approx(0, abs=1e-24)
    assert still.still
    assert not figures(scene).still
    assert not measure(scene[:1]).still


def test_flicker_of_the_whole_picture_is_no_motion() -> None:
    picture = moving_scene()[:1].repeat(FRAMES, 1, 1, 1) * 0.8
    levels = torch.tensor([0.0, 0.1]).repeat(FRAMES // 2).view(-1, 1, 1, 1)
    flickering = measure(picture + levels)
    assert flickering.still
    assert flickering.values["temporal_flickering"] == pytest.approx(0.9)


def test_a_small_object_that_moves_is_motion() -> None:
    video = torch.full((FRAMES, 3, 96, 96), 0.4)
    for index in range(FRAMES):
        video[index, :, 40:52, 20 + index : 32 + index] = 0.7
    assert not measure(video).still


def test_shuffled_frames_are_less_steady_by_every_measure() -> None:
    scene = moving_scene()
    ordered = figures(scene).values
    shuffled = figures(scene[torch.randperm(FRAMES, generator=generator())]).values
    for name in STEADINESS:
        sign = 1 if FACTS[name].better == "higher" else -1
        assert sign * ordered[name] > sign * shuffled[name], name


def test_stripes_are_found_and_wide_gradients_are_not() -> None:
    ramp = (torch.arange(WIDTH) / WIDTH).expand(1, 3, HEIGHT, WIDTH)
    assert measure(ramp).values["stripes"] < 1e-7
    striped = 0.5 + 0.1 * torch.sin(2 * math.pi * torch.arange(WIDTH) / 8).expand(1, 3, HEIGHT, WIDTH)
    assert measure(striped).values["stripes"] == pytest.approx(0.1 / math.sqrt(2), rel=0.1)


def test_a_video_washed_out_by_half_is_named() -> None:
    video = moving_scene()
    base = measure(video)

    def mixed_with_gray(share: float) -> Measures:
        return measure((torch.lerp(video, torch.tensor(0.5), share) * 255).round() / 255)

    assert washed_out(base, mixed_with_gray(0.5)) == ["saturation", "contrast"]
    assert washed_out(base, mixed_with_gray(0.3)) == []
    gray = measure(video.mean(1, keepdim=True).repeat(1, 3, 1, 1))
    assert washed_out(base, gray) == ["saturation"]
    assert washed_out(gray, gray) == []


def made_up(values: Tensor) -> list[Measures]:
    return [Measures({"motion": (float(value),)}) for value in values]


def test_equal_videos_show_no_difference() -> None:
    videos = [figures(moving_scene()[:count]) for count in (4, 6, 8)]
    found = compare(videos, videos)
    assert set(found) == set(FACTS)
    for difference in found.values():
        assert difference.verdict == "no difference seen"
        assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_intervals_are_those_of_the_paired_differences() -> None:
    prompts = torch.randn(200, generator=generator(), dtype=torch.float64)
    change = 0.1 + torch.randn(200, generator=generator(1), dtype=torch.float64)
    found = compare(made_up(5 * prompts), made_up(5 * prompts + change))["motion"]
    # The central limit theorem; a comparison without pairs would be five times as wide.
    error = 1.96 * float(change.std()) / math.sqrt(200)
    assert found.mean == pytest.approx(float(change.mean()))
    assert found.trained - found.base == pytest.approx(found.mean)
    assert found.low == pytest.approx(float(change.mean()) - error, abs=0.1 * error)
    assert found.high == pytest.approx(float(change.mean()) + error, abs=0.1 * error)
    assert found == compare(made_up(5 * prompts), made_up(5 * prompts + change))["motion"]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ([0.2, 0.3, 0.2, 0.4, 0.3], "higher"),
        ([-0.2, -0.3, -0.2, -0.4, -0.3], "lower"),
        ([0.2, -0.3, 0.2, -0.4, 0.3], "no difference seen"),
        ([0.2, 0.3], "too few prompts to tell"),
    ],
)
def test_verdicts(changes: list[float], verdict: str) -> None:
    base = noise(len(changes), seed=2)
    assert compare(made_up(base), made_up(base + torch.tensor(changes)))["motion"].verdict == verdict


def test_measures_that_some_videos_lack_are_not_compared() -> None:
    scene = moving_scene()
    assert set(compare([measure(scene), measure(scene[:1])], [measure(scene)] * 2)) == {
        "saturation",
        "contrast",
        "stripes",
    }
    with pytest.raises(ValueError, match="1 videos of the base"):
        compare([measure(scene)], [])


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(4, 1, 8, 8), r"\[F, 3, H, W\]"),
        (torch.zeros(0, 3, 8, 8), r"\[F, 3, H, W\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"\[0, 1\]"),
        (torch.full((4, 3, 8, 8), math.nan), r"\[0, 1\]"),
        (torch.full((4, 3, 8, 8), -0.5), r"\[0, 1\]"),
    ],
)
def test_what_is_no_video_is_refused(video: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(video)


class DoublesAcross(nn.Module):
    """A flow of 4 pixels to the right and 2 down, at the size at which it is asked, and a worse one before."""

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        assert first.shape == second.shape
        assert (float(first.min()), float(first.max())) == (-1, 1)
        _, _, height, width = first.shape
        assert height % 8 == width % 8 == 0
        assert min(height, width) >= 128
        return [torch.zeros(1, 2, height, width), torch.tensor([4.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, height, width)]


def test_small_and_odd_pictures_reach_raft_in_a_size_it_takes() -> None:
    frames = torch.zeros(2, 3, 64, 203)
    frames[..., 100:] = 1
    flow = Raft(DoublesAcross(), torch.device("cpu"))(*frames)
    assert flow.shape == (2, 64, 203)
    torch.testing.assert_close(flow[0], torch.full((64, 203), 4 * 203 / 208))
    torch.testing.assert_close(flow[1], torch.full((64, 203), 2 * 64 / 128))


def test_without_torchvision_raft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(UserError, match="pip install 'torchvision"):
        Raft.load(torch.device("cpu"))
