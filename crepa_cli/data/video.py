"""Reads video files as tensors and writes them, with PyAV."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import interpolate

from crepa_cli.data.clips import ClipError
from crepa_cli.files import write_whole

MAX_PIXELS = 8192 * 8192
MAX_ASPECT = 10
# A file's content, not its name, selects its reader, and a playlist would open other files and addresses.
OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif",
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_PIXELS),
}
# Titles that are not UTF-8 are common in old files. PyAV 19 reads them by itself; earlier ones raise by default.
METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "surrogateescape"} if Version(av.__version__).major < 19 else {}
BT709 = 1
LIMITED_RANGE = 1


@dataclass(frozen=True)
class VideoInfo:
    """Size, length and frame rate of a clip, as a player shows it.

    Attributes:
        frames: number of stored frames, at least 1.
        width: width in square pixels, after rotation.
        height: height in square pixels, after rotation.
        fps: average number of stored frames per second.
        duration: seconds from the start of the first frame to the end of the last.
        rounding: seconds by which the file's timestamps may be off.
    """

    frames: int
    width: int
    height: int
    fps: float
    duration: float
    rounding: float


def probe(path: Path) -> VideoInfo:
    """Measure a clip by reading all packets and decoding one picture. The header is not trusted.

    Raises:
        ClipError: if the file is unreadable or has no video stream or no frames.
    """
    picture: VideoFrame | None = None
    count = 0
    first, last = math.inf, (-math.inf, 0.0)
    with _opened(path) as video:
        for packet in video.container.demux(video.stream):
            if picture is None:
                picture = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:
                span = video.span(count, packet)
                first, last, count = min(first, span[0]), max(last, span), count + 1
        if picture is None or not count:
            raise ClipError("has no frames")
        width, height = video.shown_size(picture)
        duration = last[1] - first
        return VideoInfo(count, width, height, count / duration if duration else 0.0, duration, video.rounding)


def frames_available(info: VideoInfo, fps: float) -> int:
    """The number of frames that `decode` can return for a clip at `fps` frames per second; at least 1."""
    return _frames_before(info.duration, fps, info.rounding)


def decode(path: Path, *, frames: int, fps: float, width: int, height: int) -> Tensor:
    """The first `frames` frames of a clip at `fps` frames per second, fitted to `width` x `height` pixels.

    Frame j is the one that a player shows j / fps seconds after the clip's first frame. Pictures are resized with
    antialiasing until they just cover the target size, then center-cropped. Decoding stops after the last frame needed,
    and only the frames needed are held in memory.

    Returns:
        uint8 [F, 3, height, width], RGB from 0 to 255.

    Raises:
        ClipError: if the file is unreadable, damaged or too short.
    """
    clip = torch.empty((frames, 3, height, width), dtype=torch.uint8)
    filled = 0
    with _opened(path) as video:
        for frame, until in video.shown_frames():
            reached = min(frames, _frames_before(until, fps, video.rounding))
            if reached > filled:
                clip[filled:reached] = _fit(frame, video.shown_size(frame), width, height)
                filled = reached
            if filled == frames:
                return clip
    raise ClipError(f"is too short: it has {filled} frames at {fps:g} frames per second, {frames} are needed")


def write_video(path: Path, frames: Tensor, fps: float) -> None:
    """Write an mp4 file (H.264, which plays everywhere), completely or not at all; missing folders are created.

    Args:
        path: the file; it is replaced if it exists.
        frames: uint8 [F, 3, H, W] on any device; H and W must be even.
        fps: frames per second.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    pictures = frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        # x264's output depends on the number of threads, and on some processors its assembly code is not deterministic.
        options = {"crf": "17", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.thread_count = 1
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.colorspace = stream.color_primaries = stream.color_trc = BT709
        stream.color_range = LIMITED_RANGE
        for picture in pictures:
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())


@dataclass(frozen=True)
class _Video:
    """An open video stream, with its timestamps converted to seconds."""

    container: InputContainer
    stream: VideoStream

    @property
    def tick(self) -> float:
        """Seconds per unit of the file's timestamps."""
        return float(self.stream.time_base or 0)

    @property
    def interval(self) -> float:
        """Seconds from frame to frame according to the header; 0 if it does not say."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return float(1 / rate) if rate else 0.0

    @property
    def rounding(self) -> float:
        """Seconds by which timestamps may be off."""
        # Matroska rounds timestamps to thousandths of a second and GIF to hundredths; rates are rounded too,
        # 23.976 for 24000/1001. AVI's ticks are whole frames: nothing is rounded there.
        return max(self.tick, 0.001) if self.tick <= 0.01 else 0.001

    def span(self, index: int, item: "Packet[VideoStream] | VideoFrame") -> tuple[float, float]:
        """Start and end, in seconds, of the frame number `index`, given as a packet or a picture."""
        # AVI has no timestamps, only an order of decoding that is not the order of showing.
        if item.pts is None or self.container.format.name == "avi":
            return index * self.interval, (index + 1) * self.interval
        start = item.pts * self.tick
        return start, start + (item.duration * self.tick if item.duration else self.interval)

    def shown_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height in square pixels, after rotation."""
        width, height = max(1, round(frame.width * (self.stream.sample_aspect_ratio or 1))), frame.height
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ClipError(f"has sides of {width} and {height} pixels, more than {MAX_ASPECT} to 1")
        return (height, width) if _quarter_turns(frame) % 2 else (width, height)

    def shown_frames(self) -> Iterator[tuple[VideoFrame, float]]:
        """Each frame in display order, with the seconds from the first frame's start until the frame is replaced."""
        self.stream.thread_type = "AUTO"
        first = 0.0
        shown: VideoFrame | None = None
        end = 0.0
        for index, frame in enumerate(self.container.decode(self.stream)):
            if frame.is_corrupt:
                raise ClipError(f"is damaged at frame {index}")
            start, end = self.span(index, frame)
            if shown is None:
                first = start
            else:
                yield shown, start - first
            shown = frame
        if shown is not None:
            yield shown, end - first


@contextmanager
def _opened(path: Path) -> Iterator[_Video]:
    """The best video stream of a file; FFmpeg's errors inside the block become ClipErrors."""
    try:
        # With a scheme in front, no part of a file name can be mistaken for one.
        with av.open(f"file:{path}", options=OPEN_OPTIONS, **METADATA_OPTIONS) as container:
            stream = container.streams.best("video")
            # PyAV leaves the codec context out if FFmpeg has no decoder.
            if not isinstance(stream, VideoStream) or not isinstance(stream.codec_context, VideoCodecContext):
                raise ClipError("has no video stream that can be decoded")
            stream.codec_context.options = {"max_pixels": OPEN_OPTIONS["max_pixels"]}
            yield _Video(container, stream)
    except av.FFmpegError as error:
        raise ClipError(f"cannot be read as a video: {error.strerror}") from error


def _frames_before(seconds: float, fps: float, rounding: float) -> int:
    """How many of the times 0, 1/fps, 2/fps ... lie before `seconds`; at least 1."""
    return max(1, math.ceil((seconds - rounding) * fps))


def _quarter_turns(frame: VideoFrame) -> int:
    """The number of counter-clockwise quarter turns that bring a stored picture upright."""
    return round(frame.rotation / 90) % 4


def _fit(frame: VideoFrame, shown_size: tuple[int, int], width: int, height: int) -> Tensor:
    """The picture upright, resized to cover `width` x `height` and cropped to it: uint8 [3, height, width]."""
    stored = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    upright = torch.rot90(stored, _quarter_turns(frame), dims=(1, 2))
    shown_width, shown_height = shown_size
    scale = max(width / shown_width, height / shown_height)
    covering = (max(height, round(shown_height * scale)), max(width, round(shown_width * scale)))
    resized = interpolate(upright[None], size=covering, mode="bicubic", antialias=True)[0]
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resized[:, top : top + height, left : left + width]
