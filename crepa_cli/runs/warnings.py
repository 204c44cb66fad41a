"""Settings that are valid, and yet do nothing or something else than they seem to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from crepa_cli.errors import counted
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings, Profile, TrainSettings, step_count

LEAST_OF_PRODIGY = 0.1


def setting_warnings(profile: Profile) -> list[str]:
    """One sentence for each such setting that can be told without the clips."""
    crepa, train = profile.crepa, profile.train
    aligned = [*_alignment_steps(crepa, train.steps), *_teacher(crepa), *_threshold(crepa)] if crepa.enabled else []
    return [*aligned, *_learning_rate_steps(train), *_prodigy(train), *_unmeasured(profile)]


def _unmeasured(profile: Profile) -> Iterator[str]:
    if profile.validation.every:
        return
    if profile.data.validation_share is not None:
        yield (
            f"data.validation_share = {profile.data.validation_share}: its clips are held out, but "
            "validation.every = 0 measures no loss on them"
        )
    if profile.data.validation_path is not None:
        yield (
            f"data.validation_path = {profile.data.validation_path}: has no effect, because validation.every = 0 "
            "measures nothing"
        )


def _prodigy(train: TrainSettings) -> Iterator[str]:
    if train.optimizer == "prodigy" and train.learning_rate < LEAST_OF_PRODIGY:
        yield (
            f"train.learning_rate = {train.learning_rate:g}: Prodigy finds the rate and multiplies it by this one; "
            "set it to 1"
        )


def neighbor_warnings(crepa: CrepaSettings, family: Family, frames: Iterable[int]) -> list[str]:
    """One sentence for each length of clips at which no frame has a neighbor, though the settings ask for neighbors.

    Args:
        crepa: the settings of the alignment.
        family: of the checkpoint; a latent frame covers some of the clip's.
        frames: the frame count of every clip.
    """
    distance = crepa.adjacent_distance
    if not crepa.enabled or not distance:
        return []
    return [
        f"crepa.adjacent_distance = {distance}: {counted(clips, 'clip')} of {counted(count, 'frame')} "
        f"({counted(latents, 'latent frame')}) get no neighbors: each frame is aligned with its own features alone, "
        "as in REPA*"
        for count, clips in sorted(Counter(frames).items())
        if (latents := (count - 1) // family.frame_multiple + 1) <= (1 if crepa.cumulative_neighbors else distance)
    ]


def _alignment_steps(crepa: CrepaSettings, total: int) -> Iterator[str]:
    warmup, decay, cutoff = (
        step_count(steps, total) for steps in (crepa.warmup_steps, crepa.decay_steps, crepa.cutoff_step)
    )
    run = f"the run has {counted(total, 'step')}"
    if warmup >= total:
        yield f"crepa.warmup_steps = {crepa.warmup_steps}: {run}, so the coefficient never reaches crepa.lambda"
    if decay and crepa.scheduler == "constant":
        yield f"crepa.decay_steps = {crepa.decay_steps}: has no effect, because the constant scheduler does not decay"
    elif decay and warmup < total < warmup + decay:
        yield (
            f"crepa.decay_steps = {crepa.decay_steps}: {run}, so the coefficient does not reach crepa.lambda_end; "
            "0 decays over all steps after the warmup"
        )
    if cutoff >= total:
        yield (
            f"crepa.cutoff_step = {crepa.cutoff_step}: {run}, so alignment is never switched off; "
            'a share such as "40%" fits any length'
        )


def _teacher(crepa: CrepaSettings) -> Iterator[str]:
    block = crepa.teacher_block_index
    if crepa.use_backbone_features and block is not None and block < crepa.block_index:
        yield (
            f"crepa.teacher_block_index = {block}: the teacher is shallower than the student, "
            f"crepa.block_index = {crepa.block_index}; a teacher is usually the deeper block"
        )
    if crepa.drop_vae_encoder and (crepa.teacher_cache or crepa.use_backbone_features):
        yield (
            "crepa.drop_vae_encoder = true: has no effect, because no VAE is held during training; "
            "it is for an encoder with crepa.teacher_cache = false"
        )


def _threshold(crepa: CrepaSettings) -> Iterator[str]:
    if crepa.similarity_threshold is not None and crepa.objective == "relation":
        yield (
            f"crepa.similarity_threshold = {crepa.similarity_threshold:g}: with crepa.objective = "
            '"relation" the similarity is a correlation, so a threshold chosen for cosines switches alignment off at '
            "another point; none never does"
        )


def _learning_rate_steps(train: TrainSettings) -> Iterator[str]:
    if train.lr_warmup_steps and train.lr_scheduler == "constant":
        yield (
            f"train.lr_warmup_steps = {train.lr_warmup_steps}: has no effect with train.lr_scheduler = "
            '"constant"; take "constant_with_warmup"'
        )
    elif train.lr_warmup_steps >= train.steps:
        yield (
            f"train.lr_warmup_steps = {train.lr_warmup_steps}: the run has {counted(train.steps, 'step')}, so the "
            "learning rate never reaches train.learning_rate"
        )
