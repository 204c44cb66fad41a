"""Colors and sides of decoded pictures, held against sources in float64 and the formulas of the standards."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from numpy.typing import NDArray

from crepa_cli.data.clips import ClipError
from crepa_cli.data.picture import SCALING
from crepa_cli.data.video import decode, probe

Array = NDArray[np.float64]
# Numbers of ITU-T H.273.
BT709, UNTAGGED, BT601, BT2020, IPT = 1, 2, 6, 9, 15
PQ, HLG = 16, 18
LUMA = {BT709: (0.2126, 0.7152, 0.0722), BT601: (0.299, 0.587, 0.114), BT2020: (0.2627, 0.6780, 0.0593)}
BT709_TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
WHITE = 203.0


def scene(width: int = 96, height: int = 64) -> Array:
    """Smooth colors of the whole range: [height, width, 3] from 0 to 1."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = (columns / 17 + rows / 41, rows / 19 + 1, (columns + rows) / 23 + 2)
    return np.stack([0.5 + 0.5 * np.sin(wave) for wave in waves], axis=-1)


def stored(picture: Array, bits: int, matrix: int) -> list[NDArray[np.unsignedinteger]]:
    """The planes of 4:2:0 in limited range; chroma lies left of the middle, as in H.264."""
    red, green, blue = (picture[..., index] for index in range(3))
    weights = LUMA[matrix]
    luma = weights[0] * red + weights[1] * green + weights[2] * blue

    def halved(chroma: Array) -> Array:
        padded = np.pad(chroma, ((0, 0), (1, 1)), "edge")
        across = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:])[:, ::2] / 4
        return (across[::2] + across[1::2]) / 2

    chroma = [(blue - luma) / (2 - 2 * weights[2]), (red - luma) / (2 - 2 * weights[0])]
    planes = [16 + 219 * luma, *(128 + 224 * halved(one) for one in chroma)]
    return [(plane * 2 ** (bits - 8)).round().astype(np.uint16 if bits > 8 else np.uint8) for plane in planes]


def write(
    path: Path, picture: Array, *, bits: int = 8, matrix: int = BT709, tag: int | None = None, trc: int = BT709
) -> None:
    """Write two frames without loss; `tag` is the matrix that the file names, by default that of its pixels."""
    height, width = picture.shape[:2]
    pixels = "yuv420p" if bits == 8 else f"yuv420p{bits}le"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, pixels, 1
        stream.colorspace, stream.color_trc, stream.color_range = matrix if tag is None else tag, trc, 1
        for _ in range(2):
            frame = av.VideoFrame(width, height, pixels)
            for plane, values in zip(frame.planes, stored(picture, bits, matrix), strict=True):
                padded = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
                padded[:, : values.shape[1]] = values
                plane.update(padded.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read(path: Path, width: int = 96, height: int = 64) -> Array:
    """The first picture: [height, width, 3] from 0 to 255."""
    return decode(path, frames=1, fps=16, width=width, height=height)[0].permute(1, 2, 0).double().numpy()


def psnr(picture: Array, source: Array) -> float:
    """The signal-to-noise ratio in dB of a picture from 0 to 255 against a source from 0 to 1."""
    return float(10 * np.log10(255**2 / ((picture - source * 255) ** 2).mean()))


def hlg(light: Array) -> Array:
    """The HLG signal of light in cd/m² on a display of 1000 cd/m²: inverse OOTF and OETF of BT.2100."""
    luminance = (light @ np.array(LUMA[BT2020]) / 1000)[..., None]
    scene_light = light / 1000 * np.maximum(luminance, 1e-9) ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    curved = a * np.log(np.maximum(12 * scene_light - b, 1e-9)) + c
    return np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), curved)


def pq(light: Array) -> Array:
    """The PQ signal of light in cd/m²: inverse EOTF of BT.2100."""
    power = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def in_hdr(picture: Array, curve: Callable[[Array], Array], white: float = WHITE) -> Array:
    """An SDR picture as an HDR signal that shows its white at `white` cd/m² (BT.1886, BT.2087, BT.2408)."""
    return curve(white * picture**2.4 @ BT709_TO_BT2020.T)


@pytest.mark.parametrize(
    ("bits", "matrix"), [(8, BT709), (10, BT709), (8, BT601), (10, BT2020)], ids=["8", "10", "601", "2020"]
)
def test_colors_are_those_of_the_source(tmp_path: Path, bits: int, matrix: int) -> None:
    source = scene()
    write(tmp_path / "clip.mkv", source, bits=bits, matrix=matrix)
    assert psnr(read(tmp_path / "clip.mkv"), source) > 40
    smaller = source.reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert psnr(read(tmp_path / "clip.mkv", 48, 32), smaller) > 40
    for level in (0, 1):
        write(tmp_path / "flat.mkv", np.full((64, 96, 3), float(level)), bits=bits, matrix=matrix)
        assert (read(tmp_path / "flat.mkv") == 255 * level).all()


@pytest.mark.parametrize(("size", "matrix"), [((1280, 720), BT709), ((1280, 544), BT709), ((720, 576), BT601)])
def test_untagged_clips_have_the_matrix_that_players_take(tmp_path: Path, size: tuple[int, int], matrix: int) -> None:
    source = scene(*size)
    write(tmp_path / "clip.mkv", source, matrix=matrix, tag=UNTAGGED)
    assert psnr(read(tmp_path / "clip.mkv", *size), source) > 40


@pytest.mark.parametrize(("kind", "trc", "curve"), [("HLG", HLG, hlg), ("PQ", PQ, pq)])
@pytest.mark.parametrize("tag", [BT2020, UNTAGGED])
def test_hdr_becomes_the_picture_in_sdr(
    tmp_path: Path, kind: str, trc: int, curve: Callable[[Array], Array], tag: int
) -> None:
    source = scene()
    write(tmp_path / "clip.mkv", in_hdr(source, curve), bits=10, matrix=BT2020, tag=tag, trc=trc)
    assert probe(tmp_path / "clip.mkv").hdr == kind
    assert psnr(read(tmp_path / "clip.mkv"), source) > 30


@pytest.mark.parametrize(("trc", "curve"), [(HLG, hlg), (PQ, pq)])
def test_highlights_keep_their_order_and_their_hue(tmp_path: Path, trc: int, curve: Callable[[Array], Array]) -> None:
    ramp = np.ones((64, 96, 3)) * np.linspace(0, 1, 96)[None, :, None]
    write(tmp_path / "gray.mkv", in_hdr(ramp, curve, 1000), bits=10, matrix=BT2020, trc=trc)
    gray = read(tmp_path / "gray.mkv")
    assert np.ptp(gray, axis=2).max() <= 1
    assert (np.diff(gray[32, ::4, 0]) >= 0).all()
    assert gray[32, -1, 0] == 255
    write(tmp_path / "orange.mkv", in_hdr(ramp * [1, 0.6, 0.3], curve, 1000), bits=10, matrix=BT2020, trc=trc)
    light = (read(tmp_path / "orange.mkv")[32, 60:] / 255) ** 2.4
    assert light[:, 1] / light[:, 0] == pytest.approx(0.6**2.4, rel=0.1)


def test_a_matrix_that_cannot_be_converted_is_named_at_the_scan(tmp_path: Path) -> None:
    write(tmp_path / "clip.mkv", scene(), tag=IPT)
    for reading in (probe, read):
        with pytest.raises(ClipError, match=r"colors that cannot be converted to RGB .* matrix 15"):
            reading(tmp_path / "clip.mkv")


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", ["", "hflip", "vflip"])
def test_turned_and_mirrored_clips_are_upright(tmp_path: Path, turn: int, mirror: str) -> None:
    picture = (scene() * 255).round().astype(np.uint8)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"qp": "4"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = picture.shape[:2]
        stream.set_display_rotation(turn, **({mirror: True} if mirror else {}))
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    upright = np.rot90(scene(), turn // 90)
    upright = {"": upright, "hflip": upright[:, ::-1], "vflip": upright[::-1]}[mirror]
    info = probe(tmp_path / "clip.mp4")
    assert (info.height, info.width) == upright.shape[:2]
    assert psnr(read(tmp_path / "clip.mp4", info.width, info.height), upright) > 30


@pytest.mark.parametrize("rotation", [0, 90])
def test_interlaced_clips_are_deinterlaced(tmp_path: Path, rotation: int) -> None:
    """A bar moves by four pixels from field to field; whole pictures show it as it was in the first field."""

    def at(moment: int) -> NDArray[np.uint8]:
        picture = np.full((64, 96, 3), 32, np.uint8)
        picture[:, 4 * moment : 4 * moment + 16] = 224
        return picture

    marking = Graph()
    source = marking.add("buffer", video_size="96x64", pix_fmt="yuv420p", time_base="1/25")
    marking.link_nodes(source, marking.add("setfield", mode="tff"), marking.add("buffersink"))
    marking.configure()
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "4", "x264-params": "interlaced=1"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = 96, 64
        stream.set_display_rotation(rotation)
        for index in range(9):
            woven = at(2 * index)
            woven[1::2] = at(2 * index + 1)[1::2]
            marking.vpush(av.VideoFrame.from_ndarray(woven, format="rgb24").reformat(format="yuv420p"))
            frame = marking.vpull()
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(tmp_path / "clip.mp4")
    assert (info.frames, info.interlaced) == (9, True)
    clip = decode(tmp_path / "clip.mp4", frames=9, fps=25, width=info.width, height=info.height)
    for index, picture in enumerate(clip):
        expected = np.rot90(at(2 * index), rotation // 90)
        # The last frame has no next one to be compared with.
        assert psnr(picture.permute(1, 2, 0).double().numpy(), expected / 255) > (28 if index < 8 else 20)


def test_the_number_of_threads_changes_no_pixel(tmp_path: Path) -> None:
    write(tmp_path / "clip.mkv", scene(320, 240))
    with av.open(str(tmp_path / "clip.mkv")) as container:
        frame = next(container.decode(video=0))
    one, many = (
        frame.reformat(208, 112, "rgb24", interpolation=SCALING, threads=threads).to_ndarray() for threads in (1, 7)
    )
    assert np.array_equal(one, many)
