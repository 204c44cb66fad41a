"""Names, units, directions and definitions of the measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fact:
    """A measure in words.

    Attributes:
        label: its name in tables.
        unit: of its values.
        better: the direction in which a video improves; None if more is neither better nor worse by itself.
        definition: one sentence, with the source.
    """

    label: str
    unit: str
    better: Literal["higher", "lower"] | None
    definition: str


FACTS = {
    "temporal_flickering": Fact(
        "temporal flickering",
        "1 - level",
        "higher",
        "1 minus the mean absolute difference of neighboring frames, as VBench defines it (arXiv 2311.17982); a still "
        "video has 1.",
    ),
    "dinov2_consistency": Fact(
        "DINOv2 consistency",
        "cosine",
        "higher",
        "The mean over all frames but the first of the mean of two cosines, with the previous and with the first "
        "frame, between DINOv2 features averaged over the frame; VBench's subject consistency (arXiv 2311.17982) does "
        "the same with DINO ViT-B/16, so the two are not to be compared.",
    ),
    "warping_error": Fact(
        "warping error",
        "level squared",
        "lower",
        "The mean squared difference between a frame and the next one moved back along the optical flow, over the "
        "pixels that are visible in both (Lai et al., arXiv 1808.00449, without their mask of motion boundaries).",
    ),
    "motion": Fact(
        "motion (frame differences)",
        "level",
        None,
        "The mean over neighboring frames of the largest 5 % of the differences in brightness, on a grid of about 64 "
        "cells along the shorter side, after a change of the whole picture is subtracted; a substitute of our own for "
        "VBench's dynamic degree, which needs an optical flow; strong noise counts too.",
    ),
    "flow_motion": Fact(
        "motion (optical flow)",
        "shorter side per frame",
        None,
        "The mean over neighboring frames of the largest 5 % of the lengths of the optical flow; VBench's dynamic "
        "degree (arXiv 2311.17982) is the share of videos in which it exceeds 6/256 of the shorter side in a quarter "
        "of the frames, at 8 frames per second.",
    ),
    "saturation": Fact(
        "saturation",
        "level",
        None,
        "The mean of the largest minus the smallest of red, green and blue (the chroma of HSV), which halves if a "
        "video is mixed with as much gray.",
    ),
    "contrast": Fact(
        "contrast",
        "level",
        None,
        "The standard deviation of the brightness (luma of BT.709) within a frame, the RMS contrast of Peli (1990).",
    ),
    "stripes": Fact(
        "stripes",
        "level",
        "lower",
        "The root of the energy of the row means and the column means of the brightness after their moving average "
        "over 17 pixels is subtracted, which leaves stripes of about 16 pixels and less, the size of a token; a "
        "measure of our own.",
    ),
}
"""The measures by name; levels run from 0 to 1."""
