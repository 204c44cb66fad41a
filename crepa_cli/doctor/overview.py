"""Memory of every family's default checkpoint at its default size, for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from crepa_cli.doctor.findings import Check, FamilyMemory
from crepa_cli.doctor.fit import Target
from crepa_cli.doctor.hub import check_hub
from crepa_cli.errors import UserError
from crepa_cli.memory.prediction import predict
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import open_family


def family_memories(
    default_profile: Callable[[str, str], Profile], target: Target, report: Callable[[str], None]
) -> Iterator[FamilyMemory | Check]:
    """The memory of each family's default training; a check instead if its configuration cannot be read.

    Args:
        default_profile: returns the settings of a family's default training for a task.
        target: the device that trains. In place of a CPU, which would take months, a GPU of unknown memory is meant.
        report: receives a line of text on what is being predicted.
    """
    if target.device.type == "cpu":
        target = Target(torch.device("cuda"), None)
    profiles = [default_profile(name, task) for name in FAMILIES for task in load_family(name).checkpoints]
    yield from check_hub((str(profile.model.checkpoint), profile.model.revision) for profile in profiles)
    for profile in profiles:
        checkpoint = str(profile.model.checkpoint)
        report(f"predicting the memory of {checkpoint}, {profile.model.task}")
        try:
            family = open_family(profile)
            bucket = form_bucket(profile, family)
            prediction = predict(profile, family, bucket, target.device)
        except UserError as error:
            yield Check(f"{profile.model.family} {profile.model.task}", "warning", str(error))
        else:
            yield FamilyMemory(
                profile.model.family,
                profile.model.task,
                checkpoint,
                f"{bucket.width}x{bucket.height}, {bucket.frames} frames",
                sum(prediction.training.values()),
                max(prediction.preparation.values()),
                prediction.validation,
                target.free,
            )
