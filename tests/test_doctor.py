"""`crepa doctor`: its findings about the machine and a plan, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CREPA, OpenTiny, RunCrepa
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from safetensors import safe_open

from crepa_cli.data.cache import Cache
from crepa_cli.data.prepare import prepare
from crepa_cli.data.scan import ClipForm
from crepa_cli.data.sheet import COLUMNS, LARGEST
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.doctor import devices
from crepa_cli.doctor.cache_size import cache_bytes
from crepa_cli.doctor.clips import describe_buckets
from crepa_cli.doctor.disk import check_folder
from crepa_cli.doctor.environment import check_library, pinned_versions
from crepa_cli.doctor.findings import BucketCount
from crepa_cli.doctor.hub import check_need
from crepa_cli.errors import UserError
from crepa_cli.events import drained
from crepa_cli.hub.download import Need
from crepa_cli.models import FAMILIES
from crepa_cli.profile import CrepaSettings
from crepa_cli.settings import resolve

DEMO = ["--profile", "i2v", "--model", "wan", "--demo"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "predictions"))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction has its own tests and would take a minute in each of these."""
    monkeypatch.setattr("crepa_cli.doctor.plan.check_memory", lambda *_: None)
    monkeypatch.setattr("crepa_cli.doctor.overview.FAMILIES", {})


@pytest.fixture
def doctor(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `crepa doctor --json`, checks its exit code, and returns what it prints."""

    def run(*arguments: str, exit_code: int) -> Any:
        assert run_crepa("doctor", "--json", *arguments) == exit_code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return json.loads(captured.out)

    return run


def status(report: Any, name: str) -> str:
    return next(check["status"] for check in report["checks"] if check["name"] == name)


def failures(report: Any) -> dict[str, str]:
    return {check["name"]: check["message"] for check in report["checks"] if check["status"] == "failure"}


def stored_bytes(cache: Path, part: str) -> int:
    """The size of the tensors in a part of a cache, in bytes."""
    total = 0
    for path in (cache / part).rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.slow
def test_the_demo_would_train_and_its_cache_has_the_predicted_size(folder: Path) -> None:
    crepa = [sys.executable, "-m", "crepa_cli"]
    # Nothing but a smaller batch is left to try, each of which takes seconds.
    light = ["--set", "model.dtype=bfloat16", "--set", "adapter.rank=4", "--set", "crepa.spatial_align=false"]
    settings = [*DEMO, *light, "--set", "data.frames=9"]
    printed = subprocess.run([*crepa, "doctor", *settings, "--json"], check=True, capture_output=True, text=True)
    # On a slow machine it holds lines on what is being predicted.
    assert not {"Traceback", "Warning", "error"} & set(re.findall(r"\w+", printed.stderr))
    plan = json.loads(printed.stdout)["plan"]
    assert {(one["width"], one["height"]): one["clips"] for one in plan["buckets"]} == {
        (96, 64): 3,
        (80, 80): 3,
        (64, 96): 2,
    }
    assert {one["frames"] for one in plan["buckets"]} == {9}
    assert plan["profile"]["crepa"]["scheduler"] == "constant"
    memory = plan["memory"]
    peaks = [sum(memory["training"].values()), *memory["preparation"].values(), memory["validation"]]
    assert memory["peak"] == max(peaks)
    assert memory["validation"] > 0
    assert memory["savings"][0]["setting"] == "train.batch_size=1"

    subprocess.run([*crepa, "train", *settings, "--cache-only", "--quiet"], check=True)
    cache = folder / "crepa-demo/clips/.crepa-cache"
    for part in ("latents", "prompts", "features"):
        assert plan["cache_bytes"][part] == pytest.approx(stored_bytes(cache, part), rel=0.01)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        *((name, "t2v") for name in FAMILIES),
        ("wan", "i2v"),
        ("kandinsky5_video", "i2v"),
        pytest.param("cogvideox", "i2v", marks=pytest.mark.slow),
        # These store the same for both tasks.
        pytest.param("ltxvideo", "i2v", marks=pytest.mark.slow),
        pytest.param("sanavideo", "i2v", marks=pytest.mark.slow),
    ],
)
def test_every_family_stores_what_is_predicted(
    name: str, task: str, folder: Path, open_tiny: OpenTiny, tiny_dinov2: Path
) -> None:
    family = open_tiny(name, task)
    write_demo_clips(folder / "clips", count=1)
    crepa = CrepaSettings(block_index=8, encoder=str(tiny_dinov2), encoder_image_size="grid")
    cache = Cache(folder / "cache")
    form = ClipForm(128, 96, 17, 16)
    dtype, device = torch.bfloat16, torch.device("cpu")
    events = prepare(family, folder / "clips", form, crepa, [], cache, device, dtype, feature_dtype="int8")
    clips = drained(events, lambda _: None)
    predicted = cache_bytes(family, [clip.bucket for clip in clips], 1, dtype, crepa, "int8")
    for part in ("latents", "features"):
        assert predicted[part] == pytest.approx(stored_bytes(cache.root, part), abs=8)
    # In the tiny checkpoints masks are a larger share than in real ones.
    assert predicted["prompts"] == pytest.approx(stored_bytes(cache.root, "prompts"), rel=0.07)


def test_without_settings_the_machine_alone_is_looked_at(doctor: Any) -> None:
    report = doctor(exit_code=0)
    assert report["plan"] is None
    assert {"python", "torch", "video", "hub login", "runs folder"} <= {check["name"] for check in report["checks"]}


def test_a_table_for_the_terminal(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_crepa("doctor", *DEMO, "--contact-sheet", "sheet.png") == 0
    shown = capsys.readouterr().out
    assert "96x64, 17 frames: 3" in shown
    assert "8 clips in sheet.png" in shown
    with Image.open("sheet.png") as sheet:
        assert sheet.width == COLUMNS * LARGEST[0]
    assert "Training would start." in shown


def test_all_mistakes_of_the_settings_at_once(doctor: Any) -> None:
    Path("crepa.toml").write_text("[crepa]\nlamda = 0.3\n[train]\nsteps = 0\n")
    message = failures(doctor("--set", "data.fps=-1", exit_code=2))["profile"]
    assert "crepa.lamda" in message
    assert "train.steps = 0" in message
    assert "data.fps = -1" in message
    assert "--model" in message


def test_all_mistakes_of_the_plan_at_once(doctor: Any) -> None:
    Path("run").mkdir()
    Path("run/profile.toml").touch()
    report = doctor("--model", "wan", "--data", "nowhere", "--set", "train.output=run", exit_code=2)
    messages = failures(report)
    assert messages.keys() == {"weights", "teacher", "run folder", "clips"}
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in messages["weights"]
    assert "nowhere" in messages["clips"]
    assert status(report, "hub") == "warning"


def test_a_block_past_the_last_one(doctor: Any) -> None:
    report = doctor(*DEMO, "--set", "crepa.block_index=99", exit_code=2)
    assert "0 to 11" in failures(report)["checkpoint"]
    assert report["plan"]["cache_bytes"] is None


def test_unreadable_and_short_clips_are_named(doctor: Any) -> None:
    doctor(*DEMO, exit_code=0)
    clips = Path("crepa-demo/clips")
    (clips / "clip-03.mp4").write_bytes(b"no video")
    (clips / "clip-01.txt").unlink()
    report = doctor("--model", "wan", *local_flags(), exit_code=0)
    skipped = report["plan"]["skipped"]
    assert skipped.keys() == {"clip-01.mp4", "clip-03.mp4"}
    assert "caption" in skipped["clip-01.mp4"]
    assert sum(one["clips"] for one in report["plan"]["buckets"]) == 6
    too_long = doctor(*DEMO, "--set", "data.frames=17", "--set", "data.fps=0.5", exit_code=2)
    assert "too short" in too_long["plan"]["skipped"]["clip-02.mp4"]
    assert "no usable clip" in failures(too_long)["clips"]


def test_clips_that_are_enlarged_and_what_is_used_of_long_ones(doctor: Any) -> None:
    """The demo's clips have sides of 144 to 192 pixels, and 24 frames."""
    size = ["--set", "data.width=384", "--set", "data.height=256"]
    report = doctor(*DEMO, *size, "--set", "data.frames=9", exit_code=0)
    warnings = [check["message"] for check in report["checks"] if check["status"] == "warning"]
    (enlarged,) = [one for one in warnings if "enlarged" in one]
    assert enlarged.startswith("8 of 8 clips enlarged more than 1.5 times")
    assert enlarged.endswith("most of all clip-01.mp4: 144x144 to 320x320, 2.2 times")
    (used,) = [one for one in warnings if "longer" in one]
    assert "are longer than data.frames = 9: only the first 0.6 s of each are trained on" in used
    assert not [check for check in doctor(*DEMO, exit_code=0)["checks"] if "enlarged" in check["message"]]
    found = report["plan"]["findings"]
    assert len(found.pop("used")) == 8
    assert not any(found.values())


def test_a_size_with_more_pixels_is_explained(open_tiny: OpenTiny) -> None:
    data = resolve(None, {"model.family": "wan"}, ["data.width=832", "data.height=480"]).profile.data
    buckets = [BucketCount(81, 480, 832, 3), BucketCount(81, 640, 640, 1), BucketCount(81, 784, 512, 1)]
    assert describe_buckets(buckets, data, open_tiny("wan", "t2v")).splitlines() == [
        "5 usable clips, by size:",
        "832x480, 81 frames: 3",
        "640x640, 81 frames: 1 (+2.6%)",
        "512x784, 81 frames: 1 (+0.5%)",
        "+: more pixels than 832x480, because the sides of other aspect ratios are rounded to multiples of 16",
    ]


def local_flags() -> list[str]:
    """Settings that name the demo's files without `--demo`, which would create the clips again."""
    settings = {"crepa.encoder": "crepa-demo/dinov2", "crepa.encoder_image_size": 56, "data.width": 96}
    settings |= {"data.height": 64, "data.frames": 17}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["--task", "i2v", "--checkpoint", "crepa-demo/wan-i2v", "--data", "crepa-demo/clips", *sets]


def test_no_features_where_no_encoder_teaches(doctor: Any) -> None:
    backbone = ["--set", "crepa.use_backbone_features=true", "--set", "crepa.teacher_block_index=11"]
    report = doctor(*DEMO, *backbone, exit_code=0)
    assert report["plan"]["cache_bytes"]["features"] == 0
    assert "teacher" not in {check["name"] for check in report["checks"]}


def test_an_optimizer_that_is_not_installed(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crepa_cli.runs.checks.find_spec", lambda _: None)
    report = doctor(*DEMO, "--set", "train.optimizer=adamw8bit", exit_code=2)
    assert failures(report) == {"optimizer": "train.optimizer: adamw8bit needs bitsandbytes"}


def test_a_machine_that_cannot_encode_video(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: str) -> None:
        raise ValueError("unknown codec")

    monkeypatch.setattr("av.codec.Codec", missing)
    assert "libx264" in failures(doctor(exit_code=1))["video"]


def test_libraries_that_are_missing_or_too_old(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = SimpleNamespace(metadata={"Requires-Python": ">=99"}, requires=["torch>=99", "nowhere-to-be-found"])
    installed = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: needs if name == "crepa" else installed(name))
    report = doctor(*DEMO, exit_code=1)
    assert failures(report).keys() == {"python", "torch", "nowhere-to-be-found"}
    assert report["plan"] is None


def test_a_checkout_that_is_not_installed(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == "crepa":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert status(doctor(exit_code=0), "crepa") == "warning"


@pytest.mark.parametrize(
    ("installed", "found"), [("1.9", "failure"), ("2.0", "fine"), ("2.4.1+cpu", "fine"), ("2.5", "warning")]
)
def test_a_library_against_the_oldest_and_the_tested_version(
    installed: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: installed)
    assert check_library(Requirement("torch>=2.0"), Version("2.4.1")).status == found


def test_the_pinned_versions_are_known() -> None:
    assert {"torch", "diffusers", "transformers"} <= pinned_versions().keys()


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _: SimpleNamespace(name="Card"),
        "get_device_capability": lambda _: (9, 0),
        "mem_get_info": lambda _: (60 * 10**9, 80 * 10**9),
    }
    for name, function in facts.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(devices, "attention_kernels", lambda _: ["flash", "plain"])
    (check,) = devices.check_devices()
    assert check.status == "fine"
    assert check.name == "cuda:0: Card"
    assert "60.0 GB of 80.0 GB free" in check.message
    assert "flash, plain" in check.message

    def busy(_: torch.device) -> None:
        raise RuntimeError("device is busy")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert [check.status for check in devices.check_devices()] == ["failure"]


def test_a_torch_for_windows_without_cuda_comes_with_the_command_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "platform", "win32")
    (check,) = devices.check_devices()
    assert "pip install --force-reinstall --no-deps torch --index-url https://download.pytorch.org" in check.advice


def test_room_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20 * 10**9))
    assert check_folder("cache", folder / "new/cache", needed=10**9).status == "fine"
    assert check_folder("cache", folder, needed=19 * 10**9).status == "warning"
    assert check_folder("cache", folder, needed=21 * 10**9).status == "failure"
    (folder / "file").touch()
    assert check_folder("cache", folder / "file/cache").status == "failure"


def test_a_snapshot_counts_once_all_its_weights_are_there(folder: Path) -> None:
    snapshot = folder / "hub/models--owner--name/snapshots/abc"
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    parts = ["model-1.safetensors", "model-2.safetensors"]
    index = {"weight_map": dict(zip("ab", parts, strict=True))}
    (snapshot / "transformer/config.json").write_text("{}")
    (snapshot / "transformer/model.safetensors.index.json").write_text(json.dumps(index))
    need = Need("owner/name", None, ("transformer",))
    (snapshot / "transformer" / parts[0]).touch()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids downloads"):
        check_need("weights", need)
    (snapshot / "transformer" / parts[1]).touch()
    assert check_need("weights", need).status == "fine"


def test_a_local_checkpoint_without_weights(folder: Path) -> None:
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it lacks transformer \(weights\)"):
        check_need("weights", Need(str(folder), None, ("transformer",)))


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom crepa_cli.cli import main\nsys.argv = ['crepa', 'doctor', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    assert not {'torch', 'diffusers', 'av'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_ends_the_overview_and_its_processes_without_a_traceback(folder: Path) -> None:
    """As a terminal sends it: to all of them, while they still import."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "kept"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*CREPA, "doctor"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert any("predicting the memory of" in line for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
