"""The measurement: clips are prepared as for training, noised, and run through the frozen transformer.

The results of each clip are stored as soon as they are complete, so an interrupted measurement resumes with the next
clip.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from crepa_cli.data.cache import Cache, cache_folder, cache_key
from crepa_cli.data.clips import clips_folder
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.prepare import prepare
from crepa_cli.data.scan import ClipForm, PreparedClip
from crepa_cli.data.sources import dataset_needs, scan_sources
from crepa_cli.errors import RunError, UserError
from crepa_cli.events import Event, Notice, Progress
from crepa_cli.hub.download import download
from crepa_cli.models.capture import HiddenStateCapture
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family, Tensors
from crepa_cli.probe.clip import KERNEL_TOKENS, PROJECTOR_TOKENS, ClipProbe
from crepa_cli.probe.metrics import NEIGHBORS, NormalEquations, predicted_cosine
from crepa_cli.processes import PRECISION
from crepa_cli.profile import Profile
from crepa_cli.runs.sources import needs

LEVELS = (0.2, 0.4, 0.6, 0.8)
"""Noise levels, as fractions of the range that the transformer covers."""
CLIPS = 32
"""The most clips that are measured: the ranking of the blocks settles long before a large folder is finished."""
FOLDS = 4


class HeldOut(NamedTuple):
    """Mean cosine between each clip's features and their prediction, fitted on other clips.

    `cosines` `[clips, blocks, levels]` is for a projector of the hidden states; `constant` `[clips]` is for the mean
    feature of the other clips, which needs no hidden states.
    """

    cosines: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Measurement:
    """The measured figures, by block and noise level.

    Attributes:
        clips: number of clips measured.
        sigmas: the noise levels.
        cknna: `[blocks, levels]`, mean over clips.
        cka: `[blocks, levels]`, mean over clips.
        drift: `[blocks, levels]`, 1 - cos of adjacent frames' states, divided by the same for their features: below 1,
            the states change less from frame to frame than the features do.
        projector: None for a single clip, which leaves no other clips to fit a projector on.
    """

    clips: int
    sigmas: list[float]
    cknna: Tensor
    cka: Tensor
    drift: Tensor
    projector: HeldOut | None


def measure(profile: Profile, family: Family) -> Generator[Event, None, Measurement]:
    """Measure every block on the clips named in the settings; yields events.

    Args:
        profile: the resolved settings.
        family: family of the checkpoint.

    Raises:
        UserError: if no clip is usable, a block is the teacher, or the checkpoint is missing.
        RunError: if memory runs out or hidden states are not finite.
    """
    if profile.crepa.use_backbone_features:
        raise UserError(
            "crepa.use_backbone_features = true: blocks are compared with an encoder's features, but the teacher here "
            "is a block; add --set crepa.use_backbone_features=false"
        )
    folder = clips_folder(profile.data)
    yield from download([*needs(profile, family), *dataset_needs(profile.data)])
    accelerator = Accelerator(mixed_precision=PRECISION[profile.model.dtype])
    cache = Cache(cache_folder(profile.data), verify=True)  # nothing is made again later
    dtype = torch_dtype(profile.model.dtype)
    form = ClipForm.of(profile.data)
    found = scan_sources(family, profile.data, cache.index)
    clips = yield from prepare(
        *(family, folder, form, profile.crepa, [], cache, accelerator.device, dtype),
        scanned=found,
        feature_dtype=profile.data.feature_dtype,
    )
    if len(clips) > CLIPS:
        yield Notice(f"measuring {CLIPS} of {len(clips)} clips")
    # The order of digests is arbitrary but the same on every machine: a fair choice of clips and folds.
    clips = sorted(clips, key=lambda clip: clip.digest)[:CLIPS]
    low, high = family.sigma_range
    sigmas = [low + level * (high - low) for level in LEVELS]
    keys = _keys(profile, family, clips, sigmas)
    try:
        yield from _run_clips(profile, family, clips, keys, sigmas, cache, accelerator)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory on {accelerator.device}: set fewer frames (data.frames) or a smaller size "
            "(data.width, data.height), or use a smaller checkpoint"
        ) from error
    projector = (yield from _held_out(cache, keys)) if len(clips) > 1 else None
    return _summary(cache, keys, sigmas, projector)


def _keys(profile: Profile, family: Family, clips: list[PreparedClip], sigmas: list[float]) -> list[str]:
    """The cache key of each clip's results, from everything they depend on."""
    common: dict[str, object] = {
        "kind": "probe",
        "family": family.name,
        "task": family.task,
        "transformer": family.base.fingerprints(family.component)[0],
        "dtype": profile.model.dtype,
        "seed": profile.train.seed,
        "sigmas": sigmas,
        "tokens": [KERNEL_TOKENS, PROJECTOR_TOKENS, NEIGHBORS],
    }
    return [
        cache_key(**common, latents=clip.latents_key, prompt=clip.prompt_keys[0], features=clip.features_key)
        for clip in clips
    ]


def _run_clips(
    profile: Profile,
    family: Family,
    clips: list[PreparedClip],
    keys: list[str],
    sigmas: list[float],
    cache: Cache,
    accelerator: Accelerator,
) -> Generator[Event, None, None]:
    """Measure and store each clip that has no stored results yet."""
    missing = [index for index, key in enumerate(keys) if not cache.has("probe", key)]
    if not missing:
        return
    total, done = len(clips) * len(sigmas), (len(clips) - len(missing)) * len(sigmas)
    yield Progress("blocks", done, total, "loading the transformer")
    transformer = family.load_transformer(torch_dtype(profile.model.dtype)).to(accelerator.device)
    capture = HiddenStateCapture(family.blocks(transformer), range(family.block_count))
    dataset = ClipDataset(clips, cache, "", torch_dtype(profile.model.dtype))
    for index in missing:
        batch = dataset.batch([index], [0.0], with_features=True)
        seed = profile.train.seed, "probe", clips[index].digest
        probe = ClipProbe(family, transformer, capture, batch, sigmas, seed)
        for level in range(len(sigmas)):
            yield Progress("blocks", done, total, batch.clips[0])
            with accelerator.autocast():
                probe.run(level)
            if not probe.tensors["states"][:, level].isfinite().all():
                raise RunError(
                    f"the hidden states of {batch.clips[0]} at the noise level {sigmas[level]:g} are not finite in "
                    f"{profile.model.dtype}; are the checkpoint's files complete?"
                )
            done += 1
        cache.write("probe", keys[index], probe.tensors)
    yield Progress("blocks", done, total)


def _held_out(cache: Cache, keys: list[str]) -> Generator[Event, None, HeldOut]:
    """Cross-validation over clips: each clip is predicted by a projector fitted on the other folds.

    Blocks are processed one at a time, clip by clip, so that memory does not grow with their number. One projector
    serves all noise levels, as in training.
    """
    first = cache.read("probe", keys[0])
    blocks, levels, _, hidden_size = first["states"].shape
    feature_size = first["features"].shape[1]
    cosines = torch.empty(len(keys), blocks, levels, dtype=torch.float64)
    constant = torch.empty(len(keys), dtype=torch.float64)
    folds = [range(len(keys))[fold::FOLDS] for fold in range(min(FOLDS, len(keys)))]
    for block in range(blocks):
        yield Progress("projectors", block, blocks, f"block {block}")
        parts = [NormalEquations(hidden_size, feature_size) for _ in folds]
        for part, fold in zip(parts, folds, strict=True):
            for clip in fold:
                states, features = _states_and_features(cache, keys[clip], block)
                part.add(states.flatten(0, 1), features.repeat(levels, 1))
        for held_out, fold in enumerate(folds):
            others = NormalEquations(hidden_size, feature_size)
            for part in (*parts[:held_out], *parts[held_out + 1 :]):
                others.merge(part)
            weights = others.solve()
            for clip in fold:
                states, features = _states_and_features(cache, keys[clip], block)
                cosines[clip, block] = predicted_cosine(weights, states, features).mean(1)
                constant[clip] = F.cosine_similarity(others.constant(), features.double(), dim=-1).mean()
    yield Progress("projectors", blocks, blocks)
    return HeldOut(cosines, constant)


def _states_and_features(cache: Cache, key: str, block: int) -> tuple[Tensor, Tensor]:
    """A block's stored states `[levels, S, H]` and their features `[S, D]`; nothing else is read."""
    tensors = cache.read("probe", key)
    return tensors["states"][block], tensors["features"]


def _summary(cache: Cache, keys: list[str], sigmas: list[float], projector: HeldOut | None) -> Measurement:
    figures = [_figures(cache.read("probe", key)) for key in keys]
    cknna, cka, drift, feature_drift = (torch.stack(values).mean(0) for values in zip(*figures, strict=True))
    return Measurement(len(keys), sigmas, cknna, cka, drift / feature_drift, projector)


def _figures(tensors: Tensors) -> list[Tensor]:
    """A clip's own figures, copied to float64 so that the mapped file with its states can be released."""
    return [tensors[name].double() for name in ("cknna", "cka", "drift", "feature_drift")]
