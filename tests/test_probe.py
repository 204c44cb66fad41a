"""`crepa probe-blocks`: from the configuration alone, and measured on clips."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny, RunCrepa
from published_configs import PUBLISHED
from torch import Tensor, nn

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.cache import Cache
from crepa_cli.data.dataset import Batch
from crepa_cli.data.prepare import prepare
from crepa_cli.data.scan import ClipForm
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.demo.wan import tiny_transformer
from crepa_cli.events import drained
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.capture import HiddenStateCapture
from crepa_cli.models.wan import Wan
from crepa_cli.probe.clip import ClipProbe
from crepa_cli.probe.measure import measure
from crepa_cli.profile import CrepaSettings
from crepa_cli.settings import resolve

CLIPS = 4
FORM = ClipForm(96, 64, 17, 16)
PROJECT = """\
# my project
[model]
family = "wan" # the small one

[crepa]
# found by hand
block_index = 8 # for now
lambda = 0.4

[train]
steps = 100
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few clips; all tests share their latents and features."""
    folder = tmp_path_factory.mktemp("clips")
    write_demo_clips(folder, count=CLIPS)
    return folder


@pytest.fixture
def measured(clips: Path, open_tiny: OpenTiny, tiny_dinov2: Path) -> list[str]:
    """The arguments that measure the tiny Wan on these clips."""
    settings = {
        "model.dtype": "float32",
        "data.width": FORM.width,
        "data.height": FORM.height,
        "data.frames": FORM.frames,
        "crepa.encoder": tiny_dinov2,
        "crepa.encoder_image_size": "grid",
    }
    sets = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    return ["wan", "--checkpoint", open_tiny("wan", "t2v").base.name, "--data", str(clips), *sets]


@pytest.fixture
def probe(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `crepa probe-blocks --json` and returns what it prints."""

    def run(*arguments: object) -> Any:
        assert run_crepa("probe-blocks", *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `crepa probe-blocks`, which must exit with code 2 and one message, and returns the message."""

    def run(*arguments: object) -> str:
        assert run_crepa("probe-blocks", *arguments) == 2
        message = capsys.readouterr().err
        assert message.count("error:") == 1
        return message

    return run


# From the configuration alone.


@pytest.mark.parametrize(
    ("family", "task"), [(name, task) for name in FAMILIES for task in load_family(name).pipelines]
)
def test_every_default_checkpoint_is_known_without_network(family: str, task: str, probe: Callable[..., Any]) -> None:
    answer = probe(family, "--task", task)
    checkpoint = load_family(family).checkpoints[task]
    published = PUBLISHED[family, checkpoint]
    assert answer["checkpoint"] == checkpoint
    assert (answer["blocks"], answer["hidden_size"]) == (published.blocks, published.hidden_size)
    assert answer["block_index_range"] == [0, published.blocks - 1]
    assert answer["default"]["block"] == (10 if family in ("sanavideo", "hunyuanvideo") else 8)
    assert answer["recommended"] is answer["measurement"] is None


def test_the_parameters_of_a_block(probe: Callable[..., Any], open_tiny: OpenTiny) -> None:
    family = open_tiny("wan", "t2v")
    block = family.blocks(family.load_transformer(torch.float32))[3]
    expected = sum(parameter.numel() for parameter in block.parameters())
    assert probe("wan", "--checkpoint", family.base.name)["parameters_per_block"] == expected


def test_a_larger_checkpoint_on_a_narrow_screen(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_crepa("probe-blocks", "wan", "--checkpoint", "Wan-AI/Wan2.1-T2V-14B-Diffusers") == 0
    shown = capsys.readouterr().out
    assert "40 of width 5,120" in shown
    assert "0 to 39" in shown
    assert "arXiv 2410.06940" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_wrong_block_in_the_settings_is_no_obstacle(probe: Callable[..., Any]) -> None:
    Path("crepa.toml").write_text('[model]\nfamily = "wan"\n[crepa]\nblock_index = 99\n')
    answer = probe("wan")
    assert (answer["configured_block"], answer["default"]["block"]) == (99, 8)


def test_a_checkpoint_without_the_familys_block(probe: Callable[..., Any], open_tiny: OpenTiny) -> None:
    source = Path(open_tiny("wan", "t2v").base.name)
    for name in ("transformer/config.json", "vae/config.json", "model_index.json"):
        path = Path("short", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((source / name).read_text().replace('"num_layers": 12', '"num_layers": 6'))
    answer = probe("wan", "--checkpoint", "short")
    assert answer["blocks"] == 6
    assert answer["default"]["block"] == 2


def test_a_family_without_support(refused: Callable[..., str]) -> None:
    message = refused("hunyuan")
    assert all(family in message for family in FAMILIES)


@pytest.mark.parametrize("flags", [["--write"], ["--plot", "depth.svg"]])
def test_what_needs_a_measurement(flags: list[str], refused: Callable[..., str]) -> None:
    assert "--data DIR" in refused("wan", *flags)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom crepa_cli.cli import main\nsys.argv = ['crepa', 'probe-blocks', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    assert not {'torch', 'diffusers', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# Measured.


def features_by_prompt(clips: Path, checkpoint: str, dinov2: Path) -> list[tuple[Tensor, Tensor]]:
    """The tensors of each clip's caption `[L, D]`, and its features as tokens `[T * N, D]`."""
    family, cache = Wan(checkpoint, "t2v"), Cache(clips / ".crepa-cache")
    crepa = CrepaSettings(block_index=8, encoder=str(dinov2), encoder_image_size="grid")
    events = prepare(family, clips, FORM, crepa, [], cache, torch.device("cpu"), torch.float32)
    return [
        (
            cache.read("prompts", clip.prompt_keys[0])["prompt_embeds"],
            cache.read("features", str(clip.features_key))["features"].flatten(0, 2).float(),
        )
        for clip in drained(events, lambda _: None)
    ]


def plant(transformer: nn.Module, block: int, known: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Make the output of a block carry a linear map of the features of the clip whose caption is given."""
    carried = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    current: list[Tensor] = []

    def recognize(_module: nn.Module, _arguments: Any, inputs: dict[str, Any]) -> None:
        prompt = inputs["encoder_hidden_states"][0]
        current[:] = [features for embeds, features in known if torch.equal(embeds, prompt)]

    def carry(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        (features,) = current
        return 0.3 * output + features @ carried

    transformer.register_forward_pre_hook(recognize, with_kwargs=True)
    transformer.get_submodule(f"blocks.{block}").register_forward_hook(carry)
    return transformer


@pytest.mark.slow
@pytest.mark.parametrize("block", [2, 6, 10])
def test_a_block_that_carries_the_features_is_recommended(
    block: int,
    measured: list[str],
    clips: Path,
    tiny_dinov2: Path,
    probe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = features_by_prompt(clips, measured[2], tiny_dinov2)
    load = Wan.load_transformer
    monkeypatch.setattr(Wan, "load_transformer", lambda family, dtype: plant(load(family, dtype), block, known))
    Path("crepa.toml").write_text(PROJECT)
    # The weights are the same as without the plant: the seed tells the measurements apart in the cache.
    answer = probe(*measured, "--set", f"train.seed={block}", "--write")
    assert answer["recommended"]["block"] == block
    assert ("last third" in answer["recommended"]["reason"]) == (block == 10)
    by_block = answer["measurement"]["blocks"]
    assert min(by_block[block]["projector_cosine"]) > 0.9
    for name in ("cknna", "cka"):
        assert min(by_block[block][name]) > 3 * max(by_block[block - 1][name])
    assert Path("crepa.toml").read_text() == PROJECT.replace("block_index = 8", f"block_index = {block}")


def test_what_scripts_read(probe: Callable[..., Any], measured: list[str]) -> None:
    answer = probe(*measured)
    measurement = answer["measurement"]
    assert measurement["clips"] == CLIPS
    assert measurement["sigmas"] == [0.2, 0.4, 0.6, 0.8]
    assert 0 < measurement["constant_cosine"] < 1
    assert [one["block"] for one in measurement["blocks"]] == list(range(12))
    for one in measurement["blocks"]:
        assert one.keys() == {"block", "projector_cosine", "cknna", "cka", "drift"}
        assert all(len(values) == 4 for name, values in one.items() if name != "block")
        assert all(0 < value < 10 for value in one["drift"])
    # Random weights tell nothing of these features.
    assert answer["recommended"]["block"] == answer["default"]["block"]
    assert "better than their mean" in answer["recommended"]["reason"]


def test_a_bar_for_each_block_and_curves_over_depth(
    run_crepa: RunCrepa, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_crepa("probe-blocks", *measured, "--plot", "first.svg") == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    rows = shown[-16:-4]
    assert [row.split()[0] for row in rows] == [str(block) for block in range(12)]
    assert all("█" in row for row in rows)
    assert rows[8].split()[-2:] == ["recommended", "default"]
    assert run_crepa("probe-blocks", *measured, "--plot", "second.svg") == 0
    assert Path("first.svg").read_bytes() == Path("second.svg").read_bytes()
    drawn = " ".join(ElementTree.parse("first.svg").getroot().itertext())
    assert all(label in drawn for label in ("CKNNA", "linear CKA", "drift", "noise level 0.8", "recommended, block 8"))


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_a_stopped_measurement_goes_on_and_ends_with_the_same_numbers(
    run_crepa: RunCrepa,
    probe: Callable[..., Any],
    measured: list[str],
    clips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*measured, "--set", "train.seed=7"]
    expected = probe(*arguments)
    shutil.copytree(clips / ".crepa-cache", "stopped", ignore=shutil.ignore_patterns("probe"))
    arguments += ["--set", "data.cache=stopped"]
    passes = []
    run = ClipProbe.run

    def counted(clip: ClipProbe, level: int) -> None:
        run(clip, level)
        passes.append(level)
        if len(passes) == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ClipProbe, "run", counted)
    assert run_crepa("probe-blocks", *arguments) == 130
    captured = capsys.readouterr()
    assert not captured.out
    assert "resumes from here" in captured.err
    assert len(list(Path("stopped/probe").rglob("*.safetensors"))) == 1
    found = probe(*arguments)
    # The clip that was interrupted is measured again; the one before it is not.
    assert passes == [0, 1, 2, 3, 0, 1, 2, *[0, 1, 2, 3] * 3]
    assert found == expected
    assert probe(*arguments) == expected
    assert len(passes) == 19


def test_one_clip_cannot_hold_out_another(
    run_crepa: RunCrepa, probe: Callable[..., Any], measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo_clips(Path("one"), count=1)
    arguments = [*measured[:3], "--data", "one", *measured[5:]]
    answer = probe(*arguments)
    assert answer["measurement"]["constant_cosine"] is None
    assert answer["measurement"]["blocks"][0]["projector_cosine"] is None
    assert answer["recommended"]["block"] == 8
    assert run_crepa("probe-blocks", *arguments) == 0
    assert "measure two or more" in " ".join(capsys.readouterr().out.split())


def test_memory_does_not_grow_with_the_clips(measured: list[str], clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = resolve(None, {"model.family": "wan", "model.checkpoint": measured[2]}, measured[6::2]).profile
    profile = profile.model_copy(update={"data": profile.data.model_copy(update={"path": str(clips)})})

    def peak(seed: int, count: int) -> int:
        monkeypatch.setattr("crepa_cli.probe.measure.CLIPS", count)
        train = profile.train.model_copy(update={"seed": seed})
        with LiveBytes() as memory:
            list(measure(profile.model_copy(update={"train": train}), Wan(measured[2], "t2v")))
        return memory.peak

    peak(1, 1)  # from here on, the prepared clips are in the cache
    assert peak(2, 4) < 1.1 * peak(3, 2)


def test_states_that_are_not_finite_end_the_measurement(
    run_crepa: RunCrepa, measured: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Wan.load_transformer

    def broken(family: Wan, dtype: torch.dtype) -> nn.Module:
        transformer = load(family, dtype)
        nn.init.constant_(transformer.blocks[4].ffn.net[2].bias, torch.nan)
        return transformer

    monkeypatch.setattr(Wan, "load_transformer", broken)
    assert run_crepa("probe-blocks", *measured, "--set", "train.seed=11") == 1
    assert "at the noise level 0.2 are not finite" in capsys.readouterr().err


def test_clips_of_too_few_tokens(refused: Callable[..., str], measured: list[str]) -> None:
    size = ["--set", "data.width=16", "--set", "data.height=16", "--set", "data.frames=5"]
    assert "has only 2 tokens" in refused(*measured, *size)


def test_at_most_so_many_clips_are_measured(
    run_crepa: RunCrepa, measured: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crepa_cli.probe.measure.CLIPS", 2)
    assert run_crepa("probe-blocks", *measured) == 0
    captured = capsys.readouterr()
    assert "measuring 2 of 4 clips" in captured.err
    assert "2 clips; means" in captured.out


def test_memory_does_not_grow_with_the_blocks(open_tiny: OpenTiny) -> None:
    latents, prompt = torch.randn(1, 4, 5, 16, 24), torch.randn(1, 512, 32)
    tensors = {"latents": latents, "prompt_embeds": prompt, "fps": torch.tensor([16.0])}
    batch = Batch(("clip",), tensors, torch.randn(1, 5, 16, 48), TokenGrid(5, 4, 4))

    def peak(blocks: int) -> int:
        family = Wan(open_tiny("wan", "t2v").base.name, "t2v")
        family.config["num_layers"] = blocks
        transformer = tiny_transformer(num_layers=blocks)
        capture = HiddenStateCapture(transformer.blocks, range(blocks))
        probe = ClipProbe(family, transformer, capture, batch, [0.5], (0,))
        with LiveBytes() as memory:
            probe.run(0)
        return memory.peak

    assert peak(24) < 1.01 * peak(6)


def test_a_block_that_teaches_is_not_probed_for(refused: Callable[..., str], measured: list[str]) -> None:
    backbone = ["--set", "crepa.use_backbone_features=true", "--set", "crepa.teacher_block_index=10"]
    assert "--set crepa.use_backbone_features=false" in refused(*measured, *backbone)


def test_writing_needs_a_project_of_the_family(refused: Callable[..., str], measured: list[str]) -> None:
    assert "crepa init" in refused(*measured, "--write")
    Path("crepa.toml").write_text('[model]\nfamily = "ltxvideo"\n')
    assert "ltxvideo" in refused(*measured, "--write")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [("ltxvideo", "i2v"), ("sanavideo", "t2v"), ("kandinsky5_video", "i2v")])
def test_the_demo_measures_the_other_families(family: str, task: str, probe: Callable[..., Any]) -> None:
    answer = probe(family, "--task", task, "--demo")
    assert answer["measurement"]["clips"] == 8
    assert len(answer["measurement"]["blocks"]) == answer["blocks"] == 12
