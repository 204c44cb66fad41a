"""Memory of every family's default checkpoint at its default size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from crepa_cli.doctor.findings import Check, FamilyMemory
from crepa_cli.doctor.fit import Target
from crepa_cli.doctor.hub import check_hub
from crepa_cli.errors import UserError
from crepa_cli.memory.prediction import predict
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models import FAMILIES
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import open_family


def family_memories(
    default_profile: Callable[[str], Profile], target: Target, report: Callable[[str], None]
) -> Iterator[FamilyMemory | Check]:
    """The memory of each family's default training; a check instead if its configuration cannot be read.

    Args:
        default_profile: returns the settings of a family's default training.
        target: the device that trains.
        report: receives a line of text on what is being predicted.
    """
    profiles = [default_profile(name) for name in FAMILIES]
    yield from check_hub(str(profile.model.checkpoint) for profile in profiles)
    for profile in profiles:
        checkpoint = str(profile.model.checkpoint)
        report(f"predicting the memory of {checkpoint}")
        try:
            family = open_family(profile)
            bucket = form_bucket(profile, family)
            prediction = predict(profile, family, bucket, target.device)
        except UserError as error:
            yield Check(profile.model.family, "warning", str(error))
        else:
            yield FamilyMemory(
                profile.model.family,
                checkpoint,
                f"{bucket.width}x{bucket.height}, {bucket.frames} frames",
                sum(prediction.training.values()),
                max(prediction.preparation.values()),
                target.free,
            )
