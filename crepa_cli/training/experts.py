"""The transformers that a run trains: one, or every expert of a model, each in the steps of its own noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from diffusers import ModelMixin

from crepa_cli.models.family import Family
from crepa_cli.models.sharing import SharedPlace
from crepa_cli.profile import Profile, TrainSettings
from crepa_cli.training.checkpoints import read_progress
from crepa_cli.training.learner import Learner, build_learner
from crepa_cli.training.turns import expert_of_level, expert_of_step, steps_by_expert


class Expert(NamedTuple):
    """A transformer that is trained: its recipe, and everything that updates it."""

    family: Family
    learner: Learner


class Experts(dict[str, Expert]):
    """The transformers of a run, by the names in `family.trained`.

    Each has a projector, an optimizer and schedules of its own. The learning rate advances in the steps that train the
    expert. The coefficient advances with the run, and its threshold reads the similarity of the expert alone: the one
    that denoises less noise is more similar, and must not end the alignment of the other.

    Args:
        family: of the run.
        train: the settings that the order of the experts depends on.
        experts: by name.
    """

    def __init__(self, family: Family, train: TrainSettings, experts: Mapping[str, Expert]) -> None:
        super().__init__(experts)
        self.family = family
        self.train = train

    def at(self, step: int) -> Expert:
        """The one that a step trains."""
        return self[expert_of_step(self.family, self.train, step)]

    def of_level(self, sigma: float) -> Expert:
        """The one that denoises a level."""
        return self[expert_of_level(self.family, sigma)]

    @property
    def aligns(self) -> bool:
        """Whether CREPA still takes part in the training of any."""
        return any(expert.learner.aligns for expert in self.values())

    @property
    def transformers(self) -> dict[str, ModelMixin]:
        """The transformers by their components."""
        return {expert.family.component: expert.learner.aligned.transformer for expert in self.values()}

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the weights are their moving averages, if they are kept."""
        with ExitStack() as stack:
            for expert in self.values():
                stack.enter_context(expert.learner.averaged_weights())
            yield


def build_experts(
    profile: Profile, family: Family, teacher_size: int, accelerator: Accelerator, checkpoint: Path | None
) -> Experts:
    """Load the transformers and build what trains them; see `build_learner`."""
    place = SharedPlace(accelerator.device) if profile.memory.offload_idle_expert else None
    steps = steps_by_expert(family, profile.train) if family.trains_all else {"": profile.train.steps}
    built = {}
    for name, one in family.trained.items():
        saved = checkpoint / name if checkpoint else None
        progress = read_progress(saved) if saved else {}
        learner = build_learner(profile, one, teacher_size, accelerator, saved, progress, steps[name], place)
        built[name] = Expert(one, learner)
    return Experts(family, profile.train, built)
