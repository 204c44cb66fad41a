"""One place on the device for the frozen weights of several models, of which one computes at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crepa_cli.models.streaming import HostBlock


class SharedPlace:
    """Buffers on the device for the blocks of one model; those of the others wait on the host.

    A model's frozen parameters are copied to the device when it is called after another one. All of its backward must
    come before that.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._here: list[HostBlock] = []

    def add(self, model: nn.Module, blocks: nn.ModuleList) -> frozenset[nn.Parameter]:
        """Let a model take part.

        Args:
            model: on the CPU.
            blocks: those of the model, as many and as large as those of the others.

        Returns:
            the parameters that stay on the host.

        Raises:
            UserError: if the host's memory cannot be pinned.
        """
        own = [HostBlock(block, self.device) for block in blocks]
        if not self._buffers:
            self._buffers = [torch.empty_like(block.buffer, device=self.device) for block in own]
        model.register_forward_pre_hook(lambda *_: self._bring(own))
        return frozenset(span.parameter for block in own for span in block.spans)

    def _bring(self, blocks: list[HostBlock]) -> None:
        if blocks is self._here:
            return
        for block in self._here:
            block.show(block.buffer)
        for block, buffer in zip(blocks, self._buffers, strict=True):
            # On the stream that computes: what the model before has launched is over by then.
            block.copy_to(buffer)
            block.show(buffer)
        self._here = blocks
