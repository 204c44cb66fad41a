"""Memory of every family's default checkpoint at its default size, for each task."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

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
from crepa_cli.signals import begin_worker, ctrl_c_ignored

MOST_PROCESSES = 8
"""Each takes half a GB of memory."""


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
    families = [[default_profile(name, task) for task in load_family(name).checkpoints] for name in FAMILIES]
    if not families:
        return
    processes = min(len(families), os.cpu_count() or 1, MOST_PROCESSES)
    # Forked processes would share the threads of this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, begin_worker) as pool:
        with ctrl_c_ignored():  # and by the processes that begin now; this one ends them
            # The families that came last are the largest: they begin first, and no process ends long before the others.
            found = [pool.submit(_memories, profiles, target) for profiles in reversed(families)][::-1]
        try:
            yield from check_hub((str(one.model.checkpoint), one.model.revision) for tasks in families for one in tasks)
            for profiles, rows in zip(families, found, strict=True):
                report(f"predicting the memory of {profiles[0].model.family}")
                yield from rows.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _memories(profiles: Sequence[Profile], target: Target) -> list[FamilyMemory | Check]:
    return [_memory(profile, target) for profile in profiles]


def _memory(profile: Profile, target: Target) -> FamilyMemory | Check:
    try:
        family = open_family(profile)
        bucket = form_bucket(profile, family)
        prediction = predict(profile, family, bucket, target.device)
    except UserError as error:
        return Check(f"{profile.model.family} {profile.model.task}", "warning", str(error))
    return FamilyMemory(
        str(profile.model.family),
        profile.model.task,
        str(profile.model.checkpoint),
        f"{bucket.width}x{bucket.height}, {bucket.frames} frames",
        sum(prediction.training.values()),
        max(prediction.preparation.values()),
        prediction.validation,
        target.free,
    )
