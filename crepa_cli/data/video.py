"""Reads video files as tensors and writes them, with PyAV."""

import errno
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

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

from crepa_cli.data.clips import ClipError
from crepa_cli.data.interlaced import deinterlaced
from crepa_cli.data.picture import Orientation, PictureReader, hdr_kind
from crepa_cli.files import write_whole

# Part of the cache key: a change of the pixels that `decode` returns needs another number.
DECODING_VERSION = 2
MAX_PIXELS = 8192 * 8192
MAX_ASPECT = 10
# A file's content, not its name, selects its reader, and a playlist would open other files and addresses.
OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,asf,flv,webp_anim",
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_PIXELS),
}
# Titles that are not UTF-8 are common in old files. PyAV 19 reads them by itself; earlier ones raise by default.
METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "surrogateescape"} if Version(av.__version__).major < 19 else {}
CHECKED_SIZE = 32
SMALL = 48
SOUGHT_SECONDS = 1.0
"""Windows that begin later are sought, from a frame so long before them on."""
BT709 = 1
LIMITED_RANGE = 1


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Size, length and frame rate of a clip, as a player shows it.

    Attributes:
        frames: number of stored frames that can be shown, at least 1.
        width: width in square pixels, upright.
        height: height in square pixels, upright.
        fps: average number of stored frames per second.
        duration: seconds from the start of the first frame to the end of the last.
        rounding: seconds by which the file's timestamps may be off.
        hdr: "HLG" or "PQ" if the clip is in high dynamic range, "" if not.
        interlaced: whether the first frame is interlaced.
        image: whether the file is an image, which has no length and no frame rate.
    """

    frames: int
    width: int
    height: int
    fps: float
    duration: float
    rounding: float
    hdr: str
    interlaced: bool
    image: bool = False


def probe(path: Path) -> VideoInfo:
    """Measure a clip by reading all packets and decoding one picture. The header is not trusted.

    Frames that no player shows are not counted: those before the first key frame, and those that a file which was cut
    off holds in part.

    Raises:
        ClipError: if the file is unreadable or has no video stream or no frames.
    """
    picture: VideoFrame | None = None
    spans: list[Span] = []
    whole_until = math.inf
    with _opened(path) as video:
        for packet in video.container.demux(video.stream):
            if picture is None:
                picture = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:
                span = video.packet_span(packet)
                spans.append(span)
                if packet.is_corrupt:
                    whole_until = min(whole_until, span.start)
        if picture is None:
            raise ClipError("has no frames")
        # Frames before the first one that the decoder returns need others which the file does not have.
        first = video.frame_span(0, picture).start
        shown = [span for span in spans if first <= span.start < whole_until]
        if not shown:
            raise ClipError("is damaged at its first frame")
        width, height = video.shown_size(picture)
        PictureReader(CHECKED_SIZE, CHECKED_SIZE).read(picture, (width, height))
        duration = max(shown).end - first
        fps = len(shown) / duration if duration else 0.0
        return VideoInfo(
            len(shown), width, height, fps, duration, video.rounding, hdr_kind(picture), picture.interlaced_frame
        )


def check_aspect(width: int, height: int) -> None:
    """Raise a ClipError if a picture is too long or too high for every bucket."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ClipError(f"has sides of {width} and {height} pixels, more than {MAX_ASPECT} to 1")


def frames_available(info: VideoInfo, fps: float) -> int:
    """The number of frames that `decode` can return for a clip at `fps` frames per second; at least 1."""
    return _frames_before(info.duration, fps, info.rounding)


def decode(path: Path, *, frames: int, fps: float, width: int, height: int, start: float = 0.0) -> Tensor:
    """`frames` frames of a clip from `start` on at `fps` frames per second, fitted to `width` x `height` pixels.

    Frame j is the one that a player shows start + j / fps seconds after the clip's first frame. Interlaced frames are
    deinterlaced and HDR is tone-mapped to BT.709. Pictures are resized with antialiasing until they just cover the
    target size, then center-cropped. Decoding stops after the last frame needed, and only the frames needed are held in
    memory.

    Returns:
        uint8 [F, 3, height, width], RGB from 0 to 255.

    Raises:
        ClipError: if the file is unreadable, damaged or too short.
    """
    if start > SOUGHT_SECONDS:
        with suppress(ClipError):  # decoding from the first frame on is slow, and sure
            return _decoded(path, frames, fps, PictureReader(width, height), start, seek=True)
    return _decoded(path, frames, fps, PictureReader(width, height), start, seek=False)


def _decoded(path: Path, frames: int, fps: float, pictures: PictureReader, start: float, *, seek: bool) -> Tensor:
    """See `decode`.

    Raises:
        ClipError: also if the clip cannot be sought, with `seek`.
    """
    clip = torch.empty((frames, 3, pictures.height, pictures.width), dtype=torch.uint8)
    filled = 0
    with _opened(path) as video:
        for frame, until in video.shown_frames(start if seek else 0.0):
            reached = min(frames, _frames_before(until - start, fps, video.rounding, least=int(start == 0)))
            if reached > filled:
                clip[filled:reached] = pictures.read(frame, video.shown_size(frame))
                filled = reached
            if filled == frames:
                return clip
    raise ClipError(f"is too short: it has {filled} frames at {fps:g} frames per second, {frames} are needed")


def small_frames(path: Path) -> Iterator[tuple[Tensor, float]]:
    """Each frame of a clip up to any damage, small, and the seconds after the first at which it is shown.

    Pictures are float32 [3, SMALL, SMALL], RGB from 0 to 255.

    Raises:
        ClipError: if the file cannot be opened.
    """
    pictures, start = PictureReader(SMALL, SMALL), 0.0
    with _opened(path) as video, suppress(ClipError):
        for frame, until in video.shown_frames():
            yield pictures.read(frame, (SMALL, SMALL)).float(), start
            start = until


def write_video(path: Path, frames: Tensor, fps: float) -> None:
    """Write an mp4 file (H.264, which plays everywhere), completely or not at all; missing folders are created.

    Args:
        path: the file; it is replaced if it exists.
        frames: uint8 [F, 3, H, W] on any device; H and W must be even.
        fps: frames per second.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    write_whole(path, encoded_video(frames, fps))


def encoded_video(frames: Tensor, fps: float) -> bytes:
    """The content of the file that `write_video` writes."""
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
    return content.getvalue()


class Span(NamedTuple):
    """The seconds from which and until which a frame is shown."""

    start: float
    end: float


@dataclass(frozen=True)
class _Video:
    """An open video stream, with its timestamps converted to seconds."""

    container: InputContainer
    stream: VideoStream
    # AVI has no times of showing, but every chunk has its moment of decoding: in this order the frames are shown.
    moments: list[Span] = field(default_factory=list)

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

    def packet_span(self, packet: "Packet[VideoStream]") -> Span:
        """When the frame in a packet is shown; each packet is to be given once, in the file's order."""
        span = self._span(packet.dts if self._is_avi else packet.pts, packet.duration, len(self.moments))
        self.moments.append(span)
        return span

    def frame_span(self, index: int, frame: VideoFrame) -> Span:
        """When a decoded frame, the `index`-th in the order of showing, is shown."""
        if self._is_avi and index < len(self.moments):
            return self.moments[index]
        return self._span(frame.pts, frame.duration, index)

    def _span(self, time: int | None, duration: int | None, index: int) -> Span:
        if time is None:
            return Span(index * self.interval, (index + 1) * self.interval)
        start = time * self.tick
        return Span(start, start + (duration * self.tick if duration else self.interval))

    @property
    def _is_avi(self) -> bool:
        return self.container.format.name == "avi"

    def shown_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height in square pixels, upright."""
        width, height = max(1, round(frame.width * (self.stream.sample_aspect_ratio or 1))), frame.height
        check_aspect(width, height)
        return (height, width) if Orientation.of(frame).swapped else (width, height)

    def shown_frames(self, start: float = 0.0) -> Iterator[tuple[VideoFrame, float]]:
        """Each frame in display order, with the seconds from the first frame's start until the frame is replaced.

        Args:
            start: seconds after the first frame; frames that are over before may be left out.

        Raises:
            ClipError: if the stream is damaged, or cannot be sought.
        """
        self.stream.thread_type = "AUTO"
        first = self._seek(start) if start else None
        sought = first is not None
        shown: VideoFrame | None = None
        spans: list[Span] = []
        faults: list[ClipError] = []
        for index, frame in enumerate(deinterlaced(self._decoded(spans, faults))):
            if first is None:
                first = spans[0].start
            if shown is None:
                if sought and spans[0].start > first + start:
                    raise ClipError("cannot be sought")
            else:
                yield shown, spans[index].start - first
            shown = frame
        if shown is not None and first is not None:
            yield shown, spans[-1].end - first
        if faults:
            raise faults[0]

    def _seek(self, start: float) -> float:
        """Go to a frame from which decoding reaches the one at `start`; returns when the first frame is shown.

        Raises:
            ClipError: if the stream has no times to go by.
        """
        picture = next(iter(self.container.decode(self.stream)), None)
        if picture is None or picture.pts is None or self._is_avi or not self.tick:
            raise ClipError("cannot be sought")
        first = self.frame_span(0, picture).start
        # Ahead of the frame itself, because deinterlacing looks at those around it.
        target = max(first, first + start - SOUGHT_SECONDS)
        self.container.seek(int(target / self.tick), stream=self.stream)
        self.moments.clear()
        return first

    def _decoded(self, spans: list[Span], faults: list[ClipError]) -> Iterator[VideoFrame]:
        """Each frame in display order as it is stored, up to the first fault; spans and faults go to the lists."""
        for frame in self._decoder_output(faults):
            if frame.is_corrupt:
                faults.append(ClipError(f"is damaged at frame {len(spans)}"))
                return
            spans.append(self.frame_span(len(spans), frame))
            yield frame

    def _decoder_output(self, faults: list[ClipError]) -> Iterator[VideoFrame]:
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    self.packet_span(packet)
                yield from packet.decode()
        except av.FFmpegError as error:
            faults.append(ClipError(_damage(error)))
            # The decoder still holds frames that precede the damage.
            yield from self.stream.codec_context.decode(None)


@contextmanager
def _opened(path: Path) -> Iterator[_Video]:
    """The best video stream of a file; FFmpeg's errors inside the block become ClipErrors."""
    try:
        # With a scheme in front, no part of a file name can be mistaken for one.
        container = av.open(f"file:{path}", options=OPEN_OPTIONS, **METADATA_OPTIONS)
    except av.FFmpegError as error:
        raise ClipError(_reason(path, error)) from error
    try:
        with container:
            stream = container.streams.best("video")
            # PyAV leaves the codec context out if FFmpeg has no decoder.
            if not isinstance(stream, VideoStream) or not isinstance(stream.codec_context, VideoCodecContext):
                raise ClipError("has no video stream that can be decoded")
            stream.codec_context.options = {"max_pixels": OPEN_OPTIONS["max_pixels"]}
            yield _Video(container, stream)
    except av.FFmpegError as error:
        raise ClipError(_damage(error)) from error


def _damage(error: av.FFmpegError) -> str:
    """Why FFmpeg cannot read or decode an open file."""
    # FFmpeg calls it an invalid argument if a picture is above its limit.
    if error.errno == errno.EINVAL:
        return f"is damaged, or has pictures of more than {MAX_PIXELS:,} pixels"
    return f"is damaged or cut off: {error.strerror}"


def _reason(path: Path, error: av.FFmpegError) -> str:
    """Why FFmpeg cannot open a file."""
    try:
        boxes = _boxes(path)
    except OSError as failure:
        return f"cannot be read: {failure.strerror}"
    if b"ftyp" not in boxes[:1]:
        return "is not a video that can be read here, or is damaged at its beginning"
    if b"moov" not in boxes:
        return "is incomplete: its index (moov) is missing, as if a recording or a copy was cut off"
    return f"is damaged: {error.strerror}"


def _boxes(path: Path) -> list[bytes]:
    """The kinds of a file's boxes, as those of mp4 and mov are stored one after another."""
    boxes = []
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            boxes.append(head[4:8])
            size = int.from_bytes(head[:4]) if head[:4] != b"\0\0\0\1" else int.from_bytes(head[8:])
            if size < len(head):
                break
            file.seek(size - len(head), 1)
    return boxes


def _frames_before(seconds: float, fps: float, rounding: float, least: int = 1) -> int:
    """How many of the times 0, 1/fps, 2/fps ... lie before `seconds`; at least `least`."""
    return max(least, math.ceil((seconds - rounding) * fps))
