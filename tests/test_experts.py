"""Both experts of Wan 2.2 in one run: each trains in the steps of its own noise levels."""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import OpenTiny, RunCrepa
from diffusers import WanPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from test_wan import BOUNDARY, two_experts
from torch import Tensor, nn

from crepa_cli import api
from crepa_cli.demo.tiny import write_once
from crepa_cli.demo.wan import tiny_transformer
from crepa_cli.errors import UserError
from crepa_cli.events import Event, HeldOutMeasured, StepDone, TrainingEnded, ValidationSampled
from crepa_cli.memory.prediction import pinned_memory, training_memory
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models.sharing import SharedPlace
from crepa_cli.models.wan import Wan
from crepa_cli.profile import Profile
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.capabilities import process_mistakes
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.folder import RunFolder
from crepa_cli.training.flow import sample_sigmas, seeded_generator
from crepa_cli.training.turns import expert_of_step, expert_sigmas, steps_by_expert

STEPS = 40
EXPERTS = ("high", "low")
STATES = ("model", "optimizer", "average")
EXACT = ("step", "loss", "crepa_similarity_ema", "crepa_coefficient", "learning_rate", "grad_norm", "expert")


@pytest.fixture(scope="session", name="settings")
def _settings(open_tiny: OpenTiny, checkpoints: Path, tiny_dinov2: Path, short_clips: Path) -> Profile:
    """A run of both experts, of three blocks each."""

    def write(folder: Path) -> None:
        shutil.copytree(two_experts(open_tiny, checkpoints, "t2v"), folder, dirs_exist_ok=True)
        for component in ("transformer", "transformer_2"):
            tiny_transformer(num_layers=3).save_pretrained(folder / component)

    flags = {
        "model.family": "wan",
        "model.checkpoint": str(write_once(checkpoints / "wan-experts-shallow", write)),
        "data.path": str(short_clips),
        "crepa.encoder": str(tiny_dinov2),
    }
    sets = [
        *("model.variant=both", "model.dtype=float32", "adapter.rank=4", "adapter.dropout=0.1"),
        *("data.width=32", "data.height=32", "data.frames=9", "data.fps=8", "data.validation_share=0.4"),
        *(f"train.steps={STEPS}", "train.gradient_accumulation=2", "train.learning_rate=1e-2", "train.ema=0.9"),
        *("train.lr_scheduler=cosine", "train.lr_warmup_steps=2", "train.timestep_shift=5"),
        *(
            "crepa.block_index=1",
            "crepa.encoder_image_size=28",
            "crepa.warmup_steps=4",
            "crepa.similarity_threshold=none",
        ),
        *(f"checkpoints.every={STEPS // 2}", f"checkpoints.keep={STEPS}"),
        *(f"validation.every={STEPS}", "validation.steps=4", "validation.frames=5", "validation.prompts=['a wave']"),
    ]
    return api.resolve("t2v", flags, sets).profile


class Whole(NamedTuple):
    """An undisturbed run, and what was seen of it.

    Attributes:
        run: its folder.
        events: all.
        weights: of each expert after each step.
        levels: the noise levels that each step was trained at, by expert.
    """

    run: RunFolder
    events: list[Event]
    weights: list[dict[str, list[Tensor]]]
    levels: dict[int, list[float]]


@pytest.fixture(scope="session", name="whole")
def _whole(settings: Profile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        yield _trained(settings, tmp_path_factory.mktemp("both") / "run", patch)


def _trained(settings: Profile, output: Path, patch: pytest.MonkeyPatch) -> Whole:
    """The run, watched from outside: through the module that it trains, and the family's inputs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    experts: dict[str, nn.Module] = {}
    weights: list[dict[str, list[Tensor]]] = []
    levels: dict[int, list[float]] = defaultdict(list)
    load, step = Wan.load_transformer, Wan.step

    def loading(family: Wan, *arguments: Any, **named: Any) -> Any:
        experts[family.component] = load(family, *arguments, **named)
        return experts[family.component]

    def stepping(family: Wan, batch: Any, noise: Tensor, sigmas: Tensor) -> Any:
        if torch.is_grad_enabled():
            levels[len(weights)] += sigmas.tolist()
        return step(family, batch, noise, sigmas)

    def look(event: Event) -> None:
        if isinstance(event, StepDone):
            weights.append(
                {
                    name: [one.detach().clone() for one in module.parameters() if one.requires_grad]
                    for name, module in experts.items()
                }
            )

    patch.setattr(Wan, "load_transformer", loading)
    patch.setattr(Wan, "step", stepping)
    events: list[Event] = []
    run = api.train(settings, output=output, listeners=[events.append, look])
    patch.undo()
    return Whole(run, events, weights, levels)


@pytest.mark.slow
def test_the_weights_of_each_expert_change_in_the_steps_of_its_noise_range_alone(whole: Whole) -> None:
    steps = [event for event in whole.events if isinstance(event, StepDone)]
    assert len(steps) == STEPS
    assert {event.expert for event in steps} == set(EXPERTS)
    for event, (before, after) in zip(steps[1:], itertools.pairwise(whole.weights), strict=True):
        changed = {name for name in before if not _equal(before[name], after[name])}
        # The learning rate of an expert's first step is 0.
        own = {"transformer" if event.expert == "high" else "transformer_2"} if event.learning_rate else set()
        assert changed == own
    for event in steps:
        levels = whole.levels[event.step]
        assert len(levels) == 2
        assert all((level >= BOUNDARY) == (event.expert == "high") for level in levels)


@pytest.mark.slow
def test_each_expert_has_its_own_learning_rate_and_the_coefficient_follows_the_run(whole: Whole) -> None:
    """Each warms up in two steps of its own, and decays to its own last step."""
    steps = [event for event in whole.events if isinstance(event, StepDone)]
    for expert in EXPERTS:
        rates = [event.learning_rate for event in steps if event.expert == expert]
        assert rates[:3] == pytest.approx([0, 5e-3, 1e-2])
        assert 0 < rates[-1] < 1e-3 < rates[len(rates) // 2]
    assert [event.crepa_coefficient for event in steps[:4]] == pytest.approx([0, 0.125, 0.25, 0.375])


@pytest.mark.slow
def test_a_run_of_both_measures_held_out_clips_and_samples_videos(whole: Whole) -> None:
    measured = [event for event in whole.events if isinstance(event, HeldOutMeasured)]
    sampled = [event for event in whole.events if isinstance(event, ValidationSampled)]
    assert [event.step for event in measured] == [0, STEPS]
    assert measured[1].loss < measured[0].loss
    assert [len(event.paths) for event in sampled] == [1, 1]
    assert isinstance(whole.events[-1], TrainingEnded)
    card = whole.run.card.read_text()
    assert "(high and low noise experts)" in card
    assert 'weight_name="weights/low_pytorch_lora_weights.safetensors", load_into_transformer_2=True)' in card
    assert "`weights/run_high_comfyui.safetensors`, `weights/run_low_comfyui.safetensors`" in card


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits_with_the_idle_expert_on_the_host(
    whole: Whole, settings: Profile, tmp_path: Path
) -> None:
    """It is stopped between two steps of different experts, where the second is the first one of its expert's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    order = [event.expert for event in whole.events if isinstance(event, StepDone)]
    switch = next(step for step in range(8, STEPS) if order[step] != order[step - 1])
    done: list[Event] = []
    stopped = api.train(
        settings, output=tmp_path / "run", listeners=[done.append], should_stop=lambda: _steps(done) == switch
    )
    assert [path.name for path in stopped.checkpoints.iterdir()] == [f"step-{switch:06d}"]
    memory = settings.memory.model_copy(update={"offload_idle_expert": True})
    api.train(settings.model_copy(update={"memory": memory}), output=stopped.path, resume=True)
    last = f"checkpoints/step-{STEPS:06d}"
    files = [f"{last}/{expert}/{state}.safetensors" for expert in EXPERTS for state in STATES]
    files += [f"weights/{expert}_pytorch_lora_weights.safetensors" for expert in EXPERTS]
    for file in files:
        ours, theirs = load_file(stopped.path / file), load_file(whole.run.path / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file
    ours, theirs = (
        [[line[key] for key in EXACT] for line in read_metrics(run.metrics)] for run in (stopped, whole.run)
    )
    assert ours == theirs


@pytest.mark.slow
def test_the_two_files_load_into_one_pipeline_and_change_the_video(
    whole: Whole, settings: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = WanPipeline.from_pretrained(settings.model.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    published = _video(pipeline)
    seen = [published]
    for expert, component in zip(EXPERTS, ("transformer", "transformer_2"), strict=True):
        name = f"{expert}_pytorch_lora_weights.safetensors"
        second = {"load_into_transformer_2": True} if component == "transformer_2" else {}
        pipeline.load_lora_weights(whole.run.weights, weight_name=name, **second)
        module = getattr(pipeline, component)
        (adapter,) = module.peft_config
        loaded = get_peft_model_state_dict(module, adapter_name=adapter)
        written = load_file(whole.run.weights / name)
        assert {f"transformer.{key}" for key in loaded} == written.keys()
        assert all(torch.equal(tensor.bfloat16(), written[f"transformer.{key}"]) for key, tensor in loaded.items())
        seen.append(_video(pipeline))
    assert not [record for record in caplog.records if "unexpected" in record.message or "missing" in record.message]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(seen, 2))


@torch.no_grad()
def _video(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 1.0}
    video: Tensor = pipeline(prompt="a wave", generator=generator, output_type="pt", **arguments).frames[0]
    return video


def _steps(events: list[Event]) -> int:
    return sum(isinstance(event, StepDone) for event in events)


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "stretched"])
def test_over_all_steps_the_noise_levels_are_those_of_the_whole_range(sampling: str, settings: Profile) -> None:
    family, shift = Wan(str(settings.model.checkpoint), "t2v", variant="both"), 12.0
    train = settings.train.model_copy(
        update={"steps": 20_000, "timestep_sampling": sampling, "timestep_shift": shift, "seed": 3}
    )
    shares = steps_by_expert(family, train)
    assert sum(shares.values()) == train.steps
    drawn = torch.cat(
        [
            expert_sigmas(10 * shares[name], one, sampling, shift, seeded_generator(name))
            for name, one in family.trained.items()
        ]
    )
    wanted = sample_sigmas(200_000, sampling, shift, seeded_generator(1))
    levels = torch.linspace(0.05, 0.95, 37)[:, None]
    below, wanted_below = ((sigmas < levels).double().mean(1) for sigmas in (drawn, wanted))
    # Of 20,000 steps, the share of an expert is exact to about 0.003.
    torch.testing.assert_close(below, wanted_below, atol=0.01, rtol=0)
    assert [expert_of_step(family, train, step) for step in (5000, 7)] == [
        expert_of_step(family, train.model_copy(update={"steps": 8}), step) for step in (5000, 7)
    ]


def test_one_expert_is_on_the_device_at_a_time() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False) for _ in range(2)]
    inputs = torch.randn(3, 4)
    wanted = [model(inputs) for model in models]
    place = SharedPlace(torch.device("cpu"))
    for model in models:
        place.add(model, nn.ModuleList(model))
    for index in (0, 1, 1, 0, 1):
        assert torch.equal(models[index](inputs), wanted[index])
        here, there = ({weight.data_ptr() for weight in model.parameters()} for model in models)
        before = {weight.data_ptr() for weight in models[index].parameters()}
        assert not here & there
        models[1 - index](inputs)
        assert {weight.data_ptr() for weight in models[1 - index].parameters()} == before


@pytest.mark.slow
def test_two_experts_take_the_memory_of_two_and_in_turns_that_of_one(settings: Profile) -> None:
    gpu = torch.device("cuda")
    found = []
    for variant, in_turns in [("low", False), ("both", False), ("both", True)]:
        update = {
            "model": settings.model.model_copy(update={"variant": variant}),
            "memory": settings.memory.model_copy(update={"offload_idle_expert": in_turns}),
        }
        profile = settings.model_copy(update=update)
        family = open_family(profile)
        bucket = form_bucket(profile, family)
        parts = training_memory(profile, family, bucket, gpu)
        found.append((parts, pinned_memory(profile, family, bucket, gpu)))
    (low, _), (both, nothing), (turns, pinned) = found
    assert both["weights"] == 2 * low["weights"]
    assert both["adapter"] == turns["adapter"] == 2 * low["adapter"]
    assert both["optimizer"] == turns["optimizer"] == 2 * low["optimizer"]
    # Beside the blocks of one expert, the embeddings and the head of both stay on the device.
    assert both["weights"] - turns["weights"] == pytest.approx(pinned / 2, rel=0.1)
    assert nothing == 0


def test_the_configurations_of_both_published_experts_are_in_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for task, boundary in [("t2v", 0.875), ("i2v", 0.9)]:
        family = Wan(f"Wan-AI/Wan2.2-{task.upper()}-A14B-Diffusers", task, variant="both")
        assert [one.sigma_range for one in family.trained.values()] == [(boundary, 1.0), (0.0, boundary)]
        assert {one.block_count for one in family.trained.values()} == {40}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"kind": "full"}}, "model.variant = 'both' is for LoRAs; train one expert after the other"),
        ({"adapter": {"init_from": "lora.safetensors"}}, "one LoRA cannot start both experts"),
        ({"train": {"sharding": True}}, "keeps the weights whole"),
        ({"model": {"variant": "low"}, "memory": {"offload_idle_expert": True}}, "set model.variant = 'both'"),
        ({"memory": {"offload_idle_expert": True, "stream_weights": True}}, "on the host already"),
    ],
)
def test_what_two_experts_do_not_go_with(change: dict[str, dict[str, object]], message: str, settings: Profile) -> None:
    update = {table: getattr(settings, table).model_copy(update=keys) for table, keys in change.items()}
    with pytest.raises(UserError) as caught:
        api.check(settings.model_copy(update=update))
    assert message in str(caught.value)


def test_blocks_are_measured_for_one_expert_at_a_time(
    settings: Profile, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--checkpoint", settings.model.checkpoint, "--set", "model.variant=both")
    assert run_crepa("probe-blocks", "wan", *both) == 2
    assert "--set model.variant=high or --set model.variant=low" in capsys.readouterr().err


def test_both_are_trained_in_one_process(settings: Profile) -> None:
    both, low = (Wan(str(settings.model.checkpoint), "t2v", variant=variant) for variant in ("both", "low"))
    assert not process_mistakes(settings, both, 1)
    assert not process_mistakes(settings, low, 2)
    assert "trains in one process, and there are 2" in process_mistakes(settings, both, 2)[0]
