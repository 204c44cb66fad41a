"""The cheapest settings with which a run fits a device, by the time that they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch

from crepa_cli.data.buckets import Bucket
from crepa_cli.memory.prediction import preparation_memory, training_memory, validation_memory
from crepa_cli.memory.savings import Setting, last_that_holds, lossless_settings, with_settings
from crepa_cli.memory.shapes import hidden_bytes, token_count
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import configured, memory_mistakes
from crepa_cli.training.build import frozen_dtype

SUSTAINED = 80e12
"""FLOPs per second of training on a GPU such as the RTX 4090: half of its peak in bfloat16."""
BUS = 20e9
"""Bytes per second between host and GPU, in each direction: two thirds of PCIe 4.0 x16."""
SAME_TIME = 0.02
"""Steps whose times differ by less than this share take equally long."""
TILING = Setting("model", "vae_tiling", True)
VAE_BFLOAT16 = Setting("model", "vae_dtype", "bfloat16")
INT8 = Setting("memory", "quantize_base", "int8")
OFFLOAD = Setting("memory", "offload_activations", True)
KEEP_ATTENTION = Setting("memory", "keep", "attention")
NO_VALIDATION = Setting("validation", "every", 0)
ROUNDED = {VAE_BFLOAT16: "latents are rounded to bfloat16", INT8: "frozen weights are rounded to 8 bits"}
"""Settings that change the numbers, and what they round."""


@dataclass(frozen=True)
class Fit:
    """Settings with which a run fits a device.

    Attributes:
        settings: those to change; empty if the run fits as it is.
        peak: predicted bytes of the run.
        limit: bytes of the device.
        slowdown: estimated time of a step, relative to a step without these settings.
        profile: the run's settings with these.
        flops: of a step.
        saved: those that recomputation would take in addition if no activations were kept.
    """

    settings: Sequence[Setting]
    peak: int
    limit: int
    slowdown: float
    profile: Profile
    flops: float = 0.0
    saved: float = 0.0

    def __str__(self) -> str:
        """The settings in the form that `--set` takes."""
        return " ".join(f"--set {one}" for one in self.settings)

    @property
    def price(self) -> str:
        """The cost of the settings, in words."""
        time = "a step takes about as long"
        if abs(self.slowdown - 1) >= 0.01:
            change = f"{self.slowdown - 1:.0%} longer" if self.slowdown > 1 else f"{1 - self.slowdown:.0%} less time"
            time = f"a step takes about {change}"
        rounded = [words for setting, words in ROUNDED.items() if setting in self.settings]
        before = self.flops + self.saved
        saved = f"what is kept saves {self.saved / 1e12:.3g} of {before / 1e12:.4g} TFLOP" if self.saved else ""
        return "; ".join(filter(None, [time, saved, *rounded]))

    def to_json(self) -> dict[str, object]:
        """Settings, peak and limit as JSON values."""
        return {
            "settings": {one.name: one.value for one in self.settings},
            "peak_bytes": self.peak,
            "limit_bytes": self.limit,
        }


def cheapest_fit(
    profile: Profile,
    family: Family,
    bucket: Bucket,
    device: torch.device,
    limit: int,
    report: Callable[[str], None] = lambda _: None,
) -> Fit | None:
    """The settings that cost the least time, of those with which a run needs at most `limit` bytes; None without any.

    The settings that the profile has are kept, and others are added to them. A VAE in bfloat16 and int8 weights change
    the numbers: they are tried after all combinations without them, in this order. Validations are turned off only if
    they fit with none.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: the largest shape of its clips.
        device: the device that runs it.
        limit: bytes that it has.
        report: receives each combination before it is tried.

    Raises:
        UserError: if a configuration cannot be read.
    """
    work = Work.of(profile, family, bucket)
    dtypes: list[tuple[Setting, ...]] = [()] if profile.model.vae_dtype == "bfloat16" else [(), (VAE_BFLOAT16,)]
    tried = sorted(product(_cheapest_first(profile, device, work), dtypes), key=lambda one: (INT8 in one[0], one[1]))
    for validation in ((), (NO_VALIDATION,)) if profile.validation.every else ((),):
        for settings, dtype in tried:
            lighter = with_settings(profile, settings)
            if work.least_memory(lighter) > limit:
                continue  # a prediction takes seconds
            report(", ".join(map(str, (*settings, *dtype))) or "the settings as they are")
            training = sum(training_memory(lighter, family, bucket, device).values())
            if training > limit:
                continue
            for tiling in ((),) if family.vae_tiling else ((), (TILING,)):
                chosen = [*settings, *tiling, *dtype, *validation]
                fitted = with_settings(profile, chosen)
                peak = max(training, _peak_beside_training(fitted, configured(family, fitted), bucket, device, limit))
                if peak <= limit:
                    return work.fit(profile, chosen, peak, limit)
    return None


def fastest_fit(
    profile: Profile,
    family: Family,
    bucket: Bucket,
    device: torch.device,
    limit: int,
    report: Callable[[str], None] = lambda _: None,
) -> Fit | None:
    """Like `cheapest_fit`, and spends the memory that is left over on activations that are kept, not recomputed."""
    fit = cheapest_fit(profile, family, bucket, device, limit, report)
    if fit is None:
        return None

    def training(settings: Sequence[Setting]) -> int:
        report(", ".join(map(str, settings)))
        return sum(training_memory(with_settings(profile, settings), family, bucket, device).values())

    work = Work.of(profile, family, bucket)
    spending = _spending(profile, fit.settings, family.block_count, device, work, lambda one: training(one) <= limit)
    if spending == fit.settings:
        return fit
    beside = _peak_beside_training(fit.profile, configured(family, fit.profile), bucket, device, limit)
    return work.fit(profile, spending, max(training(spending), beside), limit)


def _spending(
    profile: Profile,
    settings: Sequence[Setting],
    blocks: int,
    device: torch.device,
    work: Work,
    fits: Callable[[Sequence[Setting]], bool],
) -> list[Setting]:
    """Settings that fit, with those that spend what is left over: on the results of attention, then on whole blocks.

    Attention saves several times as many FLOPs per byte as the rest of a block.
    """
    fitted = with_settings(profile, settings)
    memory = fitted.memory
    if not fitted.recomputes_blocks or memory.stream_weights or memory.finer_recompute:
        return list(settings)
    ways = [[KEEP_ATTENTION]] if memory.keep == "nothing" and work.attention else []
    if ways and device.type != "cpu" and not memory.offload_activations:
        both = [KEEP_ATTENTION, OFFLOAD]
        ways += [both] if work.seconds(with_settings(fitted, both)) < work.seconds(fitted) else []
    spending = next((found for way in ways if fits(found := _replaced(settings, *way))), list(settings))
    counts = [Setting("memory", "keep_blocks", count) for count in range(memory.keep_blocks + 1, blocks + 1)]
    most = last_that_holds(counts, lambda one: fits(_replaced(spending, one)))
    return _replaced(spending, most) if most else spending


def _replaced(settings: Iterable[Setting], *others: Setting) -> list[Setting]:
    """The settings with others, each of which takes the place of one of the same name."""
    return list({one.name: one for one in (*settings, *others)}.values())


def _peak_beside_training(profile: Profile, family: Family, bucket: Bucket, device: torch.device, limit: int) -> int:
    """Bytes at the peak of the preparation, and of a validation if the preparation fits."""
    preparation = max(preparation_memory(profile, family, bucket, device).values())
    return preparation if preparation > limit else max(preparation, validation_memory(profile, family, device))


def lightest(profile: Profile, device: torch.device) -> Profile:
    """The profile with every setting that reduces memory and changes no result by more than rounding."""
    for setting in lossless_settings(profile, device):
        lighter = with_settings(profile, [setting])
        profile = profile if memory_mistakes(lighter) else lighter
    return profile


def _cheapest_first(profile: Profile, device: torch.device, work: Work) -> list[tuple[Setting, ...]]:
    """Every valid combination of settings that reduce memory, those with int8 weights last."""
    settings = lossless_settings(profile, device)
    if profile.memory.quantize_base == "none":
        settings = [*settings, INT8]
    found = [
        tried
        for count in range(len(settings) + 1)
        for tried in combinations(settings, count)
        if not memory_mistakes(with_settings(profile, tried))
    ]

    def cost(tried: tuple[Setting, ...]) -> tuple[bool, int, int]:
        slowdown = work.seconds(with_settings(profile, tried)) / work.seconds(profile)
        return INT8 in tried, round(slowdown / SAME_TIME), len(tried)

    return sorted(found, key=cost)


@dataclass(frozen=True)
class Work:
    """The work of a step, to estimate what settings cost.

    Attributes:
        forward: FLOPs of the blocks' forward pass: two for each weight and token, and those of full attention, which
            is too much if it is sparse.
        weights: bytes of the blocks.
        states: bytes of the hidden states between blocks.
        attention: the part of `forward` that `memory.keep = "attention"` keeps.
        blocks: how many there are.
        experts: how many transformers are trained.
    """

    forward: float
    weights: int
    states: int
    attention: float = 0.0
    blocks: int = 1
    experts: int = 1

    @classmethod
    def of(cls, profile: Profile, family: Family, bucket: Bucket) -> Work:
        """The work for clips of a shape."""
        with torch.device("meta"):
            blocks = family.blocks(family.empty_transformer(frozen_dtype(profile)))
        tokens = token_count(family, bucket)
        parameters = sum(parameter.numel() for parameter in blocks.parameters())
        # Families of linear attention compare no tokens.
        attention = (
            profile.train.batch_size * 4 * tokens**2 * family.hidden_size * len(blocks)
            if family.attention_heads or family.needs_compilation
            else 0
        )
        return cls(
            forward=profile.train.batch_size * 2 * tokens * parameters + attention,
            weights=sum(parameter.nbytes for parameter in blocks.parameters()),
            states=hidden_bytes(profile, family, bucket) * len(blocks),
            attention=attention if family.attention_heads else 0,
            blocks=len(blocks),
            experts=len(family.trained),
        )

    def least_memory(self, profile: Profile) -> int:
        """Bytes that a device needs for certain under these settings."""
        memory = profile.memory
        weights = 0 if memory.stream_weights else self.weights // (4 if memory.quantize_base == "int8" else 1)
        weights *= 1 if memory.offload_idle_expert else self.experts
        return weights + (0 if memory.offload_activations else self.states)

    def fit(self, profile: Profile, settings: Sequence[Setting], peak: int, limit: int) -> Fit:
        """The fit of a profile with these settings."""
        fitted = with_settings(profile, settings)
        keeping_nothing = with_settings(
            fitted, [Setting("memory", "keep", "nothing"), Setting("memory", "keep_blocks", 0)]
        )
        flops, before = self.flops(fitted), self.flops(keeping_nothing)
        return Fit(settings, peak, limit, self.seconds(fitted) / self.seconds(profile), fitted, flops, before - flops)

    def flops(self, profile: Profile) -> float:
        """FLOPs of a step under these settings.

        A LoRA's backward has the FLOPs of one forward, full tuning's those of two, and attention's two and a half, as
        its scores are computed again. Finer recomputation takes another forward.
        """
        passes = 1 if profile.adapter.kind == "lora" else 2
        backward = passes * (self.forward - self.attention) + 2.5 * self.attention
        finer = self.forward if profile.memory.finer_recompute else 0.0
        return self.forward + backward + self._recomputed(profile) + finer

    def _recomputed(self, profile: Profile) -> float:
        """FLOPs of activation checkpointing: a forward of what is not kept."""
        if not profile.recomputes_blocks:
            return 0.0
        kept = min(profile.memory.keep_blocks / self.blocks, 1.0)
        return (1 - kept) * (self.forward - (self.attention if profile.memory.keep == "attention" else 0.0))

    def seconds(self, profile: Profile) -> float:
        """Estimated seconds of a step under these settings; copies run beside the computation, in either direction."""
        memory = profile.memory
        forward = self.forward / SUSTAINED
        backward = self.flops(profile) / SUSTAINED - forward
        copied = self.weights / BUS / (2 if memory.quantize_base == "int8" else 1)
        weights = copied if memory.stream_weights else 0.0
        # Of two steps in a row, about every other pair trains both experts; nothing computes meanwhile.
        switch = copied / 2 if memory.offload_idle_expert else 0.0
        states = self.states / BUS if memory.offload_activations else 0.0
        return switch + max(forward, weights, states) + max(backward, weights + states)
