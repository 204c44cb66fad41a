"""Turns decoded frames into upright RGB pictures in the colors of BT.709."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import unpack
from typing import Any, NamedTuple, cast

import av
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, ColorTrc, Interpolation, VideoReformatter
from torch import Tensor

from crepa_cli.data.clips import ClipError

# Bit-exact: the same pixels on every processor. Without the other three, colors are off by up to 2 levels.
SCALING = (
    Interpolation.BICUBIC
    | Interpolation.BITEXACT
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
UNTAGGED = 2
HDR = {int(ColorTrc.ARIB_STD_B67): "HLG", int(ColorTrc.SMPTE2084): "PQ"}
# The white of SDR in HDR (BT.2408) and the peak that HLG is defined for (BT.2100), in cd/m².
WHITE = 203.0
PEAK = 1000.0
KNEE = 0.8
DISPLAY_GAMMA = 2.4
LUMINANCE = (0.2627, 0.6780, 0.0593)
BT2020_TO_BT709 = (
    (1.660491, -0.587641, -0.072850),
    (-0.124550, 1.132900, -0.008349),
    (-0.018151, -0.100579, 1.118730),
)


class Orientation(NamedTuple):
    """How a stored picture becomes upright: rows and columns are swapped first, then sides are mirrored."""

    swapped: bool
    left_right: bool
    top_down: bool

    @classmethod
    def of(cls, frame: VideoFrame) -> "Orientation":
        """The orientation that the file's display matrix asks for, to the nearest quarter turn."""
        matrix = cast(Mapping[str, Any], frame.side_data).get("DISPLAYMATRIX")
        if matrix is None:
            return cls(False, False, False)
        # x' = a x + c y and y' = b x + d y
        a, b, _, c, d = unpack("=5i", bytes(matrix)[:20])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def upright(self, picture: Tensor) -> Tensor:
        """A view of `picture` [3, H, W] with its sides where they belong, or a copy if they are mirrored."""
        if self.swapped:
            picture = picture.transpose(1, 2)
        mirrored = [dim for dim, mirror in ((1, self.top_down), (2, self.left_right)) if mirror]
        # Flipping no sides would copy the picture all the same.
        return picture.flip(mirrored) if mirrored else picture


def hdr_kind(frame: VideoFrame) -> str:
    """The kind of high dynamic range of a frame, "HLG" or "PQ"; "" in standard range."""
    return HDR.get(frame.color_trc, "")


@dataclass(frozen=True)
class PictureReader:
    """Reads the frames of one clip as pictures of one size; frames are cropped around the center.

    Attributes:
        width: width of the pictures in pixels.
        height: height of the pictures in pixels.
    """

    width: int
    height: int
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)

    def read(self, frame: VideoFrame, shown_size: tuple[int, int]) -> Tensor:
        """The frame upright, resized with antialiasing to cover the size, and cropped to it.

        Frames in HDR are tone-mapped to BT.709.

        Args:
            frame: a decoded frame.
            shown_size: its width and height in square pixels, upright.

        Returns:
            uint8 [3, height, width], RGB.

        Raises:
            ClipError: if the frame's colors cannot be converted to RGB.
        """
        orientation = Orientation.of(frame)
        shown_width, shown_height = shown_size
        scale = max(self.width / shown_width, self.height / shown_height)
        covering = (max(self.width, round(shown_width * scale)), max(self.height, round(shown_height * scale)))
        kind = hdr_kind(frame)
        pixels = self._rgb(frame, *(covering[::-1] if orientation.swapped else covering), deep=bool(kind))
        top, left = (covering[1] - self.height) // 2, (covering[0] - self.width) // 2
        picture = orientation.upright(pixels)[:, top : top + self.height, left : left + self.width]
        return tone_mapped(picture.float() / 65535, kind) if kind else picture

    def _rgb(self, frame: VideoFrame, width: int, height: int, *, deep: bool) -> Tensor:
        """The stored picture as RGB in 8 bits, or 16 if `deep`: [3, height, width]."""
        try:
            converted = self.reformatter.reformat(
                frame,
                width,
                height,
                "rgb48le" if deep else "rgb24",
                src_colorspace=_matrix(frame),
                interpolation=SCALING,
            )
        except (av.FFmpegError, ValueError) as error:
            raise ClipError(
                f"has colors that cannot be converted to RGB (pixels {frame.format.name}, matrix {frame.colorspace}): "
                "convert the clip to BT.709"
            ) from error
        return torch.from_numpy(converted.to_ndarray()).permute(2, 0, 1)


def tone_mapped(signal: Tensor, kind: str) -> Tensor:
    """An HDR picture as SDR: [3, H, W] in BT.2100 RGB from 0 to 1 becomes uint8 in BT.709.

    White of SDR, 203 cd/m² in HDR (BT.2408), stays nearly white. Darker colors stay what they are, brighter ones up to
    1000 cd/m² are compressed into the brightest fifth, with their hue.
    """
    light = (_hlg_light(signal) if kind == "HLG" else _pq_light(signal)) / WHITE
    light = torch.einsum("ij,jhw->ihw", torch.tensor(BT2020_TO_BT709), light).clamp(min=0)
    brightest = light.amax(0)
    over = (brightest - KNEE).clamp(min=0) / (1 - KNEE)
    most = (PEAK / WHITE - KNEE) / (1 - KNEE)
    # Reinhard et al. 2002, Eq. 4, above the knee: slope 1 at the knee, 1 at the peak.
    compressed = KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + over)
    light = light * torch.where(over > 0, compressed / brightest, 1.0)
    return (light.clamp(max=1) ** (1 / DISPLAY_GAMMA) * 255).round().to(torch.uint8)


def _hlg_light(signal: Tensor) -> Tensor:
    """Light in cd/m² of a 1000 cd/m² display that shows an HLG signal (BT.2100, tables 5 and 6)."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * math.log(4 * a)
    scene = torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)
    luminance = torch.einsum("i,ihw->hw", torch.tensor(LUMINANCE), scene)
    return PEAK * luminance**0.2 * scene


def _pq_light(signal: Tensor) -> Tensor:
    """Light in cd/m² of a PQ signal (BT.2100, table 4)."""
    m1, m2 = 2610 / 16384, 2523 / 32
    c1, c2, c3 = 3424 / 4096, 2413 / 128, 2392 / 128
    root = signal ** (1 / m2)
    return 10000 * ((root - c1).clamp(min=0) / (c2 - c3 * root)) ** (1 / m1)


def _matrix(frame: VideoFrame) -> Colorspace | None:
    """The matrix of a frame whose file names none, as players guess it; None if it is named or the frame is RGB."""
    if frame.colorspace != UNTAGGED or frame.format.is_rgb or frame.format.has_palette:
        return None
    if hdr_kind(frame):
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.height >= 720 or frame.width >= 1280 else Colorspace.ITU601
