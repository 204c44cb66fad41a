"""How much a video changes from frame to frame. A still video is perfectly steady: look at the motion too."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor


def temporal_flickering(video: Tensor) -> list[float]:
    """1 minus the mean absolute difference of each frame `[3, H, W]` and the next, F - 1 values.

    Their mean is VBench's temporal flickering (arXiv 2311.17982).
    """
    return [1 - float((second.double() - first.double()).abs().mean()) for first, second in itertools.pairwise(video)]


def consistency(features: Tensor) -> list[float]:
    """The mean of the cosines of each frame with the previous and with the first one, F - 1 values.

    Their mean over the frames is VBench's subject consistency (arXiv 2311.17982) on features of another encoder, except
    that VBench cuts negative cosines off at 0.

    Args:
        features: `[F, ..., D]`; those of a frame are averaged first, as VBench compares one vector per frame.
    """
    frames = features.double().flatten(1, -2).mean(1) if features.ndim > 2 else features.double()
    previous = F.cosine_similarity(frames[1:], frames[:-1], dim=1)
    first = F.cosine_similarity(frames[1:], frames[:1], dim=1)
    curve: list[float] = ((previous + first) / 2).tolist()
    return curve
