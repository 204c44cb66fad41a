"""RAFT (arXiv 2003.12039), the optical flow of VBench, from torchvision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crepa_cli.errors import UserError

MULTIPLE, SMALLEST = 8, 128
"""The sides of a picture that RAFT takes, in pixels."""


class Raft:
    """The flow between two frames; see `crepa_cli.measures.warping.Flow`.

    Args:
        model: takes two batches of pictures in [-1, 1] and returns a list of flows, of which the last is the best.
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.device = device

    @classmethod
    def load(cls, device: torch.device) -> Raft:
        """The large model, whose weights (20 MB) torchvision downloads once.

        Raises:
            UserError: if torchvision is not installed, or the weights cannot be downloaded.
        """
        try:
            from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
            raise UserError(
                "the warping error needs an optical flow, and torchvision cannot be imported: pip install "
                f"'torchvision>=0.24', in the version that belongs to the installed torch ({error})"
            ) from error
        try:
            # torchvision's own way to load them would run whatever is pickled in the file.
            weights = torch.hub.load_state_dict_from_url(
                Raft_Large_Weights.DEFAULT.url, progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"the weights of RAFT cannot be downloaded: {error}") from error
        model = raft_large()
        model.load_state_dict(weights)
        return cls(model, device)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """The flow `[2, H, W]` in pixels from one frame `[3, H, W]` to another, on the CPU."""
        height, width = first.shape[-2:]
        size = _accepted(height), _accepted(width)
        frames = torch.stack([first, second]).to(self.device, torch.float32)
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True) * 2 - 1
        flow: Tensor = self.model(frames[:1], frames[1:])[-1]
        flow = F.interpolate(flow, (height, width), mode="bilinear", antialias=True)[0].cpu()
        return flow * torch.tensor([width / size[1], height / size[0]]).view(2, 1, 1)


def _accepted(side: int) -> int:
    return max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE)
