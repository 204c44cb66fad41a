"""All figures of a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from crepa_cli.measures.color import contrast, saturation, stripes
from crepa_cli.measures.motion import STILL, difference_motion
from crepa_cli.measures.steadiness import consistency, temporal_flickering
from crepa_cli.measures.warping import Flow, along_flow

Encoder = Callable[[Tensor], Tensor]
"""Features `[F, ..., D]` of frames `[F, 3, H, W]` in [0, 1]."""


@dataclass(frozen=True)
class Measures:
    """The figures of a video.

    Attributes:
        curves: values by the name of the measure, as in `FACTS`: one for each frame, or, if a measure compares frames,
            one for each frame but the first. Measures that need an encoder, a flow or a second frame are left out if
            there is none.
    """

    curves: Mapping[str, tuple[float, ...]]

    @property
    def values(self) -> dict[str, float]:
        """The mean of each curve."""
        return {name: fmean(curve) for name, curve in self.curves.items()}

    @property
    def still(self) -> bool:
        """Whether nothing moves, so that its steadiness says nothing; False for a single picture."""
        return "motion" in self.curves and self.values["motion"] < STILL


def measure(video: Tensor, encode: Encoder | None = None, flow: Flow | None = None) -> Measures:
    """Measure a video, in float64 and with the memory of a few frames.

    How well a video agrees with its caption is left out: the text encoders of the families know no pictures, and no
    model that compares both, such as CLIP, is loaded for training.

    Args:
        video: float `[F, 3, H, W]` in [0, 1], on the CPU.
        encode: DINOv2, for the consistency; called once, with the whole video.
        flow: such as `crepa_cli.measures.raft.Raft`, for the warping error and the motion along the flow.

    Raises:
        ValueError: if the shape is another one, or values are not numbers in [0, 1].
    """
    if video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise ValueError(f"expected a video [F, 3, H, W], got {list(video.shape)}")
    if not video.is_floating_point() or not (video.amin() >= 0 and video.amax() <= 1):
        raise ValueError("expected a video of floating point numbers in [0, 1]")
    curves = {"saturation": saturation(video), "contrast": contrast(video), "stripes": stripes(video)}
    if len(video) > 1:
        curves |= {"temporal_flickering": temporal_flickering(video), "motion": difference_motion(video)}
        if encode is not None:
            curves["dinov2_consistency"] = consistency(encode(video))
        if flow is not None:
            curves["warping_error"], curves["flow_motion"] = along_flow(video, flow)
    return Measures({name: tuple(curve) for name, curve in curves.items()})
