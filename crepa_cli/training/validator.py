"""Validation videos during training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from statistics import fmean

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from crepa_cli.data.scan import ClipForm, PreparedClip
from crepa_cli.data.video import write_video
from crepa_cli.events import ValidationSampled
from crepa_cli.heap import release_memory
from crepa_cli.measures import measure
from crepa_cli.models.family import Family
from crepa_cli.processes import from_all
from crepa_cli.profile import Profile
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import Prompts
from crepa_cli.training.experts import Experts
from crepa_cli.training.sampling import VideoSampler, sampling
from crepa_cli.training.sheets import SampleSheets


class Validator:
    """Samples one video for each validation prompt, always from the same noise, so that steps can be compared.

    Args:
        profile: the resolved settings.
        family: whose pipeline samples.
        prompts: one for each video, and the negative one of classifier-free guidance.
        form: size, length and frame rate of the clips; `validation.frames` may replace the length.
        run: the run's folder.
        accelerator: device and processes.
        reference: a clip that is trained on, to show beside the videos.
    """

    def __init__(
        self,
        profile: Profile,
        family: Family,
        prompts: Prompts,
        form: ClipForm,
        run: RunFolder,
        accelerator: Accelerator,
        reference: PreparedClip | None = None,
    ) -> None:
        self.images = profile.validation.images
        self.seed = profile.train.seed
        self.prompts = prompts
        self.run = run
        self.accelerator = accelerator
        self.sampler = VideoSampler(profile, family, form, accelerator.device)
        self.sheets = SampleSheets(run, profile.validation.prompts, form.fps, reference)

    def sample(self, experts: Experts, step: int, should_stop: Callable[[], bool]) -> ValidationSampled:
        """Sample and measure the videos after `step` steps, with a sheet of their frames beside them.

        The processes of a run share out the prompts, and the main one writes and measures. If `should_stop` becomes
        true, the videos that are complete are written and the others are left out.
        """
        transformers = experts.transformers
        with experts.averaged_weights(), ExitStack() as stack:
            for transformer in transformers.values():
                stack.enter_context(sampling(transformer, self.accelerator))
            pipeline = self.sampler.load_pipeline(transformers)
            sharded = any(isinstance(transformer, FSDPModule) for transformer in transformers.values())
            videos = self._sample_share(pipeline, sharded, should_stop)
            del pipeline
        release_memory()
        frames = dict(from_all(videos))
        folder = self.run.samples(step)
        paths = {index: folder / f"{index:02d}.mp4" for index in sorted(frames)}
        measures = {}
        if self.accelerator.is_main_process and frames:
            folder.mkdir(parents=True, exist_ok=True)
            for index, path in paths.items():
                write_video(path, frames[index], self.sampler.form.fps)
            self.sheets.write(step, frames)
            if len(frames) == len(self.prompts.validation):
                measures = mean_measures(frames.values())
        return ValidationSampled(step, tuple(paths.values()), measures)

    def _sample_share(
        self, pipeline: DiffusionPipeline, sharded: bool, should_stop: Callable[[], bool]
    ) -> list[tuple[int, Tensor]]:
        """Index and frames, uint8 `[F, 3, H, W]`, of this process's videos."""
        mine = range(len(self.prompts.validation))
        if not sharded:
            mine = mine[self.accelerator.process_index :: self.accelerator.num_processes]
        videos = []
        for index in mine:
            video = self.sampler.sample(
                pipeline,
                self.prompts.validation[index],
                self.prompts.negative,
                image=self.images[index] if self.images else None,
                seed=self.seed,
                # A sharded transformer needs all processes in every step of the sampler: none may leave alone.
                should_stop=(lambda: False) if sharded else should_stop,
            )
            if video is None:
                break
            videos.append((index, video))
        return videos


def mean_measures(videos: Iterable[Tensor]) -> dict[str, float]:
    """The mean of each measure over videos, uint8 `[F, 3, H, W]`, and the number of those that are `still`.

    Consistency and optical flow are left out. The teacher is not in memory during training, which reads its features
    from the cache, and to load an encoder or RAFT beside the model could run out of memory.
    """
    found = [measure(frames.float() / 255) for frames in videos]
    means = {name: fmean(video.values[name] for video in found) for name in found[0].curves}
    return means | {"still": sum(video.still for video in found)}
