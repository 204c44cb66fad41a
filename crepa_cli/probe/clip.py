"""Run one clip through the frozen transformer, reducing each block's hidden states to figures on the fly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

from crepa_cli.alignment.comparison import full_precision
from crepa_cli.alignment.grid import TokenGrid, coarser_grid, matching_frames
from crepa_cli.data.dataset import Batch
from crepa_cli.errors import UserError, counted
from crepa_cli.models.capture import HiddenStateCapture
from crepa_cli.models.family import Family, Tensors
from crepa_cli.probe.metrics import centered_kernel, cknna, linear_cka
from crepa_cli.training.flow import seeded_generator

KERNEL_TOKENS = 1024
"""The most tokens of a clip that CKNNA and CKA compare; their kernels grow with the square of this number."""
LEAST_TOKENS = 4
"""The fewest tokens for which the unbiased CKA is defined."""
PROJECTOR_TOKENS = 128
"""The most tokens of a clip that are stored for the projector, for each block and noise level."""


class ComparedTokens:
    """The grid on which a clip's tokens are compared with the teacher's features, and the sample of tokens used.

    As in the loss, both are resampled to the grid with fewer tokens per frame.

    Args:
        student: grid of the transformer's tokens.
        teacher: grid of the features.
        generator: draws the sample, the same for every block and noise level.
    """

    def __init__(self, student: TokenGrid, teacher: TokenGrid, generator: torch.Generator) -> None:
        self.grid = coarser_grid(student, teacher)
        tokens = student.frames * self.grid.tokens
        sample = torch.randperm(tokens, generator=generator)[:KERNEL_TOKENS].sort().values
        self.patches = [sample[sample // self.grid.tokens == frame] for frame in range(student.frames)]
        self.patches = [sampled % self.grid.tokens for sampled in self.patches]

    def look(self, frames: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """The sampled tokens of a clip, and its drift; only two resampled frames are in memory at a time.

        Args:
            frames: `[rows, columns, C]` each.

        Returns:
            `[n, C]`, and the mean of 1 - cos over adjacent frames and all patches, a 0-d tensor; 0 for a single frame.
        """
        samples, drifts, before = [], [], None
        for frame, sampled in zip(frames, self.patches, strict=True):
            tokens = resampled(frame, self.grid)
            samples.append(tokens[sampled])
            if before is not None:
                drifts.append(1 - F.cosine_similarity(tokens, before, dim=-1).mean())
            before = tokens
        sample = torch.cat(samples)
        return sample, torch.stack(drifts).mean() if drifts else sample.new_zeros(())


def resampled(frame: Tensor, grid: TokenGrid) -> Tensor:
    """A frame `[rows, columns, C]` resampled to another grid, `[N, C]`, with the interpolation of the loss."""
    values = frame.movedim(-1, 0)[None]
    values = F.interpolate(values, (grid.rows, grid.columns), mode="bilinear", align_corners=False)
    return values[0].flatten(1).T


class ClipProbe:
    """The measurement of one clip, one noise level at a time.

    Hidden states are compared as the projector's Linear receives them: after a LayerNorm, on the common grid. The
    features have unit length.

    Args:
        family: the transformer's family.
        transformer: frozen, on its device.
        capture: attached to all blocks.
        batch: this clip alone, with features.
        sigmas: the noise levels; all of them use the same noise.
        seed: seed of the noise and of the sample; it includes the clip's digest.

    Attributes:
        tensors: `cka`, `cknna` and `drift` `[blocks, levels]`, `feature_drift` `[]`, `states` `[blocks, levels, S, H]`
            in float16, and `features` `[S, D]` in float32 of the same tokens.

    Raises:
        UserError: if the clip has too few tokens to compare.
    """

    def __init__(
        self,
        family: Family,
        transformer: ModelMixin,
        capture: HiddenStateCapture,
        batch: Batch,
        sigmas: list[float],
        seed: tuple[int | str, ...],
    ) -> None:
        assert batch.features is not None, "the batch must be read with features"
        assert batch.teacher_grid is not None, "features must have a grid"
        self.family = family
        self.transformer = transformer
        self.capture = capture
        self.sigmas = sigmas
        self.inputs = {name: tensor.to(transformer.device) for name, tensor in batch.tensors.items()}
        latents = self.inputs["latents"]
        generator = seeded_generator(*seed)
        self.noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        self.grid, teacher = family.token_grid(latents), batch.teacher_grid
        self.tokens = ComparedTokens(self.grid, teacher, generator)
        features = batch.features[0].unflatten(1, (teacher.rows, teacher.columns))
        chosen = matching_frames(teacher.frames, self.grid.frames)
        sample, drift = self.tokens.look(features[frame].to(latents.device, torch.float32) for frame in chosen)
        if len(sample) < LEAST_TOKENS:
            raise UserError(
                f"{batch.clips[0]} has only {counted(len(sample), 'token')}, too few to compare blocks: "
                "set a larger size (data.width, data.height) or more frames (data.frames)"
            )
        self.features = F.normalize(sample, dim=-1)
        self.kernel = centered_kernel(self.features)
        self.stored = torch.linspace(0, len(sample) - 1, min(PROJECTOR_TOKENS, len(sample))).long()
        shape = family.block_count, len(sigmas)
        self.tensors: Tensors = {
            "cka": torch.empty(shape),
            "cknna": torch.empty(shape),
            "drift": torch.empty(shape),
            "feature_drift": drift.cpu(),
            "states": torch.empty(*shape, len(self.stored), family.hidden_size, dtype=torch.float16),
            "features": self.features[self.stored].cpu(),
        }

    @torch.no_grad()
    def run(self, level: int) -> None:
        """Run one forward pass at a noise level."""
        sigma = self.noise.new_tensor([self.sigmas[level]])
        step = self.family.step(self.inputs, self.noise, sigma)
        with self.capture.watching(lambda block, hidden: self._reduce(block, level, hidden)):
            self.transformer(**step.inputs)

    def _reduce(self, block: int, level: int, hidden: Tensor) -> None:
        with full_precision(hidden.device):
            states = self.family.row_major(hidden, self.grid)[0].unflatten(1, (self.grid.rows, self.grid.columns))
            sample, drift = self.tokens.look(F.layer_norm(frame.float(), frame.shape[-1:]) for frame in states)
            kernel = centered_kernel(sample)
            at = block, level
            self.tensors["cka"][at] = linear_cka(kernel, self.kernel)
            self.tensors["cknna"][at] = cknna(kernel, self.kernel)
            self.tensors["drift"][at] = drift
            self.tensors["states"][at] = sample[self.stored]
