"""The videos of an evaluation: each is written whole as soon as it is made, and an interrupted one goes on after it."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from crepa_cli.data.cache import Cache, cache_folder, cache_key
from crepa_cli.data.clips import Clip, ClipError, clips_folder, file_digest
from crepa_cli.data.prompts import prompt_key
from crepa_cli.data.scan import ClipForm
from crepa_cli.data.sources import clips_here
from crepa_cli.data.video import write_video
from crepa_cli.errors import RunError, UserError
from crepa_cli.evaluate.prompts import Sampled, prompts_of_file, prompts_of_run
from crepa_cli.evaluate.result import Column, Evaluation, Row
from crepa_cli.evaluate.videos import REFERENCE, chosen_clips, load_tools, measured, written_clips
from crepa_cli.evaluate.weights import Weights, open_weights
from crepa_cli.events import Event, Notice, Progress
from crepa_cli.heap import release_memory
from crepa_cli.hub.download import download
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.processes import PRECISION
from crepa_cli.profile import CrepaSettings, Profile
from crepa_cli.runs.capabilities import attention_mistakes, compile_mistakes, dtype_mistakes
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.prompts import Prompts, negative_prompt, read_prompts, sampled_texts
from crepa_cli.runs.sources import needs
from crepa_cli.training.build import frozen_in_int8
from crepa_cli.training.sampling import VideoSampler, sampling

SLUG_LENGTH = 40


@dataclass(frozen=True)
class Request:
    """The models to evaluate, and how.

    Attributes:
        profile: settings for all videos: those of the first run.
        runs: folders of runs with their settings, and LoRAs without.
        prompts: a file of prompts; None for those of the run and captions.
        seeds: how many videos of each prompt.
        output: folder of the evaluation.
    """

    profile: Profile
    runs: Sequence[tuple[str, Profile | None]]
    prompts: Path | None
    seeds: int
    output: Path


def evaluate_runs(request: Request) -> Generator[Event, None, Evaluation]:
    """Sample the same prompts with the same seeds from the base and from trained weights, and compare the videos.

    Raises:
        UserError: a mistake in the settings, weights, prompts or clips.
        RunError: if memory runs out.
    """
    columns = open_weights(request.profile, request.runs)
    clips = yield from _clips(request.profile)
    profile, prompts = _with_prompts(request, clips)
    family = open_family(profile, resumes=True)
    accelerator = Accelerator(mixed_precision=PRECISION[profile.model.dtype])
    _check_device(profile, family, accelerator.device)
    yield from download(needs(profile, family))
    form = ClipForm.of(profile.data)
    sampler = VideoSampler(profile, family, form, accelerator.device)
    seeds = [profile.train.seed + index for index in range(request.seeds)]
    videos = _Videos(request.output / "videos", profile, family, prompts, seeds, sampler.form)
    encoded = yield from read_prompts(profile, family, _cache(profile, request.output), accelerator.device)
    try:
        for weights in columns:
            yield from _sample_missing(videos, weights, profile, encoded, accelerator)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory on {accelerator.device}: stream the weights (--set memory.stream_weights=true), or set "
            "fewer frames (--set validation.frames=N)"
        ) from error
    reference = yield from written_clips(clips, sampler.form, request.output)
    tools = yield from load_tools(_encoder(profile, columns), accelerator.device)
    named = [(weights.name, videos.paths(weights)) for weights in columns]
    found = yield from measured([*named, (REFERENCE, reference)], tools)
    made = [Column(weights.name, part, weights.settings) for weights, part in zip(columns, found, strict=False)]
    return Evaluation(
        rows=tuple(Row(prompt.text, seed) for prompt in prompts for seed in seeds),
        base=made[0],
        others=tuple(made[1:]),
        reference=Column(REFERENCE, found[-1]) if reference else None,
        sampling=videos.sampling | {"seeds": seeds},
        notes=tools.notes,
    )


def _check_device(profile: Profile, family: Family, device: torch.device) -> None:
    if mistakes := [
        *dtype_mistakes(profile, device),
        *compile_mistakes(profile, device),
        *attention_mistakes(profile, family, device),
    ]:
        raise UserError("\n".join(mistakes))


def _clips(profile: Profile) -> Generator[Event, None, list[Clip]]:
    """Some of the training clips; none, with a notice, if they are not on this machine."""
    try:
        return chosen_clips(clips_here(profile.data))
    except UserError as error:
        yield Notice(f"no training clips as a reference: {error}")
        return []


def _with_prompts(request: Request, clips: Sequence[Clip]) -> tuple[Profile, list[Sampled]]:
    """The settings with the prompts of the evaluation in place of those of the validation, and these prompts."""
    profile, output = request.profile, request.output
    if request.prompts is None:
        prompts = prompts_of_run(profile, clips, output)
    else:
        prompts = prompts_of_file(request.prompts, profile.model.task)
    update = {
        "every": 1,
        "prompts": tuple(prompt.text for prompt in prompts),
        "images": tuple(prompt.image for prompt in prompts if prompt.image),
    }
    return profile.model_copy(update={"validation": profile.validation.model_copy(update=update)}), prompts


def _cache(profile: Profile, output: Path) -> Cache:
    """The cache of the run, or one in the output if its clips are not on this machine."""
    data = profile.data
    there = data.cache is not None or (bool(data.all_sources) and clips_folder(data).is_dir())
    return Cache(cache_folder(data) if there else output / "cache")


def _encoder(profile: Profile, columns: Sequence[Weights]) -> CrepaSettings | None:
    """The settings of the first encoder that teaches a run; None if there is none."""
    profiles = [profile, *(weights.profile for weights in columns if weights.profile)]
    return next((one.crepa for one in profiles if one.crepa.encoder_teaches), None)


@dataclass(frozen=True)
class _Videos:
    """The files of an evaluation, each named by everything that it depends on."""

    folder: Path
    profile: Profile
    family: Family
    prompts: Sequence[Sampled]
    seeds: Sequence[int]
    form: ClipForm

    @property
    def sampling(self) -> dict[str, object]:
        """How the videos are sampled, by name."""
        validation, family = self.profile.validation, self.family
        return {
            "base": family.base.shown_name,
            "family": family.name,
            "task": family.task,
            "steps": validation.steps,
            "guidance_scale": validation.guidance_scale,
            "negative_prompt": negative_prompt(validation, family),
            "dtype": self.profile.model.dtype,
            **self.form._asdict(),
        }

    def paths(self, weights: Weights) -> list[Path]:
        """The files of a column, in the order of the rows."""
        family, dtype = self.family, torch_dtype(self.profile.model.dtype)
        texts = sampled_texts(self.profile.validation, family)
        common = self.sampling | {
            "kind": "evaluation",
            "weights": weights.digest,
            "component": "+".join(one.component for one in weights.family.trained.values()) if weights.paths else None,
            "models": family.base.fingerprints(*family.transformer_components, *family.vae_components),
            "vae": family.encoding,
            "int8": frozen_in_int8(self.profile),
        }
        keys = [
            cache_key(**common, prompt=prompt_key(family, text, dtype), image=_image_digest(prompt), seed=seed)
            for prompt, text in zip(self.prompts, texts, strict=True)
            for seed in self.seeds
        ]
        titles = [f"{_slug(prompt.text)}-seed{seed}" for prompt in self.prompts for seed in self.seeds]
        folder = self.folder / _slug(weights.name)
        return [folder / f"{title}-{key[:10]}.mp4" for title, key in zip(titles, keys, strict=True)]


def _slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII).strip("-.")[:SLUG_LENGTH] or "video"


def _image_digest(prompt: Sampled) -> str | None:
    if prompt.image is None:
        return None
    try:
        return file_digest(Path(prompt.image))
    except ClipError as error:
        raise UserError(f"{prompt.image} {error}") from error


def _sample_missing(
    videos: _Videos, weights: Weights, profile: Profile, encoded: Prompts, accelerator: Accelerator
) -> Generator[Event, None, None]:
    """Sample the videos of a column that are not there yet."""
    paths = videos.paths(weights)
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return
    stage = f"videos of {weights.name}"
    done, total = len(paths) - len(missing), len(paths)
    yield Progress(stage, done, total, "loading the transformer")
    sampler = VideoSampler(profile, weights.family, videos.form, accelerator.device)
    transformers = weights.load(profile, accelerator.device)
    pipeline = sampler.load_pipeline(transformers)
    for index in missing:
        number, seed = index // len(videos.seeds), videos.seeds[index % len(videos.seeds)]
        prompt = videos.prompts[number]
        yield Progress(stage, done, total, prompt.text)
        with ExitStack() as stack:
            for transformer in transformers.values():
                stack.enter_context(sampling(transformer, accelerator))
            texts = encoded.validation[number], encoded.negative
            frames = sampler.sample(pipeline, *texts, image=prompt.image, seed=seed)
        assert frames is not None, "nothing stops the sampler"
        write_video(paths[index], frames, videos.form.fps)
        done += 1
    del pipeline, transformer, transformers
    release_memory()
    yield Progress(stage, done, total)
