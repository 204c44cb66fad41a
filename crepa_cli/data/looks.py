"""Says which clips are trained on in another look than their own."""

from collections.abc import Iterator, Sequence

from crepa_cli.data.buckets import Bucket, Size, fit
from crepa_cli.data.video import VideoInfo
from crepa_cli.errors import counted, listed
from crepa_cli.events import Notice

LARGE_CROP = 0.1


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
