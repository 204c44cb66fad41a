"""Which settings a resumed run may change."""

from __future__ import annotations

from crepa_cli.profile import Profile

FIXED = {
    "model": ("family", "task", "variant"),
    "adapter": ("kind", "rank", "target_modules"),
    "data": ("validation_share",),
    "train": ("optimizer", "beta1", "beta2", "eps"),
    "crepa": ("enabled", "use_backbone_features", "objective", "projector"),
}
"""Settings that shape the weights and the optimizer's state of a checkpoint, the objective, which gives the similarity
and its average their meaning, and the share of held-out clips, which are trained on without it."""


def resume_mistakes(saved: Profile, wanted: Profile) -> list[str]:
    """The settings that differ from the run's own and cannot take effect in the middle of it.

    Args:
        saved: the settings that the run was started with.
        wanted: those it is to be resumed with.
    """
    before, after = (profile.model_dump(by_alias=True) for profile in (saved, wanted))
    mistakes = [
        f"{table}.{key} = {after[table][key]!r}: the run was started with {before[table][key]!r}, and a resumed run "
        "cannot change it; leave it out, or start a new run without --resume"
        for table, keys in FIXED.items()
        for key in keys
        if before[table][key] != after[table][key]
    ]
    if wanted.data.validation_share is not None and saved.train.seed != wanted.train.seed:
        mistakes.append(
            f"train.seed = {wanted.train.seed}: the run was started with {saved.train.seed}, and the seed chooses the "
            "held-out clips of data.validation_share; leave it out, or start a new run without --resume"
        )
    if bool(saved.train.ema) != bool(wanted.train.ema):
        mistakes.append(
            f"train.ema = {wanted.train.ema:g}: the run was started with {saved.train.ema:g}, and a moving average can "
            "neither begin nor end in the middle of a run; leave it out, or start a new run without --resume"
        )
    return mistakes
