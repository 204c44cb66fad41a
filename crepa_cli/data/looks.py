"""Says which clips are trained on in part, or in another look than their own."""

from collections.abc import Iterator, Sequence

from crepa_cli.data.buckets import Bucket, Size, fit
from crepa_cli.data.video import VideoInfo, frames_available
from crepa_cli.errors import counted, listed
from crepa_cli.events import Notice

LARGE_CROP = 0.1


def unused(clips: Sequence[tuple[VideoInfo, Bucket, float]], frames: int, fps: float) -> Iterator[Notice]:
    """A notice of the part of long clips that is trained on.

    Args:
        clips: what was measured of each video, its bucket, and the frame rate that it is trained at.
        frames: the most frames that are trained on.
        fps: the frame rate of the settings.
    """
    long = sum(frames_available(info, rate) > frames for info, _, rate in clips)
    if long:
        share = sum(bucket.frames / rate for _, bucket, rate in clips) / sum(info.duration for info, _, _ in clips)
        yield Notice(
            f"{long} of {counted(len(clips), 'clip')} are longer than data.frames = {frames}: only the first "
            f"{frames / fps:.1f} s of each are trained on, {share:.0%} of all seconds; set data.sampling to "
            "use the rest"
        )


def changed_looks(clips: Sequence[tuple[str, VideoInfo, Bucket]]) -> Iterator[Notice]:
    """A notice each on the clips that are tone-mapped, deinterlaced, or cropped by more than a tenth.

    Args:
        clips: the name of each clip, what was measured, and its bucket.
    """
    changed = {
        "in HDR, tone-mapped to BT.709": [f"{name} ({info.hdr})" for name, info, _ in clips if info.hdr],
        "interlaced, deinterlaced": [name for name, info, _ in clips if info.interlaced],
        "cropped by more than a tenth": [crop for clip in clips if (crop := _large_crop(*clip))],
    }
    for how, names in changed.items():
        if names:
            yield Notice(f"{counted(len(names), 'clip')} {how}: {listed(names)}")


def _large_crop(name: str, info: VideoInfo, bucket: Bucket) -> str | None:
    """The part that a clip loses, if that is much."""
    enlargement, cropped = fit(info.width, info.height, Size(bucket.width, bucket.height))
    if cropped <= LARGE_CROP:
        return None
    sizes = f"{info.width}x{info.height} scaled by {enlargement:.2f} for {bucket.width}x{bucket.height}"
    return f"{name} loses {cropped:.0%} ({sizes})"
