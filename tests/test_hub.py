"""Downloads from the Hub, against a stub of it on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import CREPA, OpenTiny, RunCrepa
from hub_stub import HubStub

from crepa_cli.errors import UserError
from crepa_cli.events import Notice, Progress
from crepa_cli.hub import question
from crepa_cli.hub.download import Need, download, fetch, missing_files
from crepa_cli.hub.messages import HubError, HubUnreachableError
from crepa_cli.hub.needed import lacking, small_files, weight_files
from crepa_cli.hub.read import read_config
from crepa_cli.settings import resolve
from crepa_cli.training.checkpoints import newest_checkpoint, read_progress

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
TEACHER = "facebook/dinov2-small"
TEACHER_NEED = Need(TEACHER, None, ("",))
DECOY = b"nobody needs this" * 10_000
CARD = b"---\nlicense: apache-2.0\n---\n"
WAN_DECOYS = {
    "transformer/diffusion_pytorch_model.fp16.safetensors": DECOY,
    "transformer/diffusion_pytorch_model.bin": DECOY,
    "vae/nested/config.json": DECOY,
    "google/umt5-xxl/tokenizer.json": DECOY,
}
TEACHER_DECOYS = {"onnx/model.onnx": DECOY, "onnx/config.json": DECOY, "pytorch_model.bin": DECOY}


@pytest.fixture
def published(stub: HubStub, open_tiny: OpenTiny, tiny_dinov2: Path) -> HubStub:
    """The stub with a tiny base model and a tiny teacher under published names."""
    stub.add(WAN, Path(open_tiny("wan", "t2v").base.name), decoys=WAN_DECOYS | {"README.md": CARD})
    stub.add(TEACHER, tiny_dinov2, decoys=TEACHER_DECOYS)
    return stub


def asked(stub: HubStub) -> list[str]:
    """The repositories whose listings were asked for, one for each request."""
    parts = [request.path.strip("/").split("/") for request in stub.requests]
    return ["/".join(part[2:4]) for part in parts if part[:2] == ["api", "models"]]


def needed_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def start(run_crepa: RunCrepa, *more: object) -> int:
    """Train the demo's clips with the models of the Hub."""
    return run_crepa(
        *("train", "--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 1, "--checkpoint", WAN),
        *("--set", f"crepa.encoder={TEACHER}", "--set", "crepa.encoder_image_size=56"),
        *("--set", "validation.every=0", *more),
    )


def revisions(run: Path) -> tuple[str | None, str | None]:
    """The commits of base model and teacher in a run's settings, which its newest checkpoint states as well."""
    profile = resolve(str(run / "profile.toml")).profile
    found = profile.model.revision, profile.crepa.encoder_revision
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert read_progress(checkpoint)["revisions"] == {"model": found[0], "encoder": found[1]}
    return found


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_first_start_takes_what_is_needed_and_later_ones_nothing(
    published: HubStub,
    open_tiny: OpenTiny,
    tiny_dinov2: Path,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert start(run_crepa) == 0
    base = needed_bytes(Path(open_tiny("wan", "t2v").base.name))
    assert published.sent == base + len(CARD) + needed_bytes(tiny_dinov2)
    assert sorted(asked(published)) == [WAN, TEACHER]
    output = capsys.readouterr().out
    assert "to download into" in output
    assert output.index("downloading:") < output.index("scanning:")

    # A commit that arrives later makes no difference to a run that is resumed.
    first = published.repositories[WAN].head
    published.repositories[WAN].commits.append(published.repositories[WAN].commits[0] | {"new.txt": b"new"})
    assert revisions(tmp_path / "runs/wan-t2v-1") == (first, published.repositories[TEACHER].head)
    card = (tmp_path / "runs/wan-t2v-1/README.md").read_text()
    assert f"at commit `{first}`" in card
    assert "license: apache-2.0" in card
    published.requests.clear()
    assert start(run_crepa, "--resume", "--steps", 2, "--output", "runs/wan-t2v-1") == 0
    assert published.requests == []
    assert revisions(tmp_path / "runs/wan-t2v-1") == (first, published.repositories[TEACHER].head)

    # A new run asks once per repository, and takes only what the new commit has changed.
    assert start(run_crepa) == 0
    assert sorted(asked(published)) == [WAN, TEACHER]
    assert revisions(tmp_path / "runs/wan-t2v-2")[0] == published.repositories[WAN].head != first
    assert published.sent == 0

    # A Hub that accepts connections and never answers holds nobody up.
    published.silent = True
    capsys.readouterr()
    before = time.monotonic()
    assert start(run_crepa) == 0
    assert time.monotonic() - before < 10
    assert "does not answer" in capsys.readouterr().out


def test_an_interrupted_download_resumes_where_it_stopped(published: HubStub, tiny_dinov2: Path) -> None:
    size = needed_bytes(tiny_dinov2)
    published.bytes_per_second = 400_000
    events = download([TEACHER_NEED])
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, Progress) and event.done > size / 4:
            break
    events.close()
    workers = [thread for thread in threading.enumerate() if thread.name == "crepa-download"]
    for thread in workers:
        thread.join()
    assert any(isinstance(event, Notice) and "to download into" in event.message for event in seen)
    assert any("model" in event.item and "%" in event.item for event in seen if isinstance(event, Progress))
    arrived = size - sum(one.file.size - one.arrived for one in missing_files(TEACHER_NEED))
    assert size / 4 < arrived < size
    published.bytes_per_second = None
    published.requests.clear()
    last = [event for event in download([TEACHER_NEED]) if isinstance(event, Progress)]
    assert last[0].done >= last[0].total - (size - arrived)
    assert published.sent == size - arrived
    assert lacking(fetch(TEACHER_NEED), [""]) == []


def test_connections_that_break_and_servers_that_fail_are_survived(published: HubStub, tiny_dinov2: Path) -> None:
    published.statuses = [500, 429, 503]
    published.drop_after, published.drops = 50_000, 4
    list(download([TEACHER_NEED]))
    assert published.drops == 0
    assert (fetch(TEACHER_NEED) / "model.safetensors").read_bytes() == (tiny_dinov2 / "model.safetensors").read_bytes()
    assert any(request.first for request in published.requests)


def test_a_hub_that_keeps_failing_is_reported_with_the_file(published: HubStub) -> None:
    published.statuses = [500] * 100
    with pytest.raises(UserError, match=rf"(config\.json|model\.safetensors) of {TEACHER}.*fault of its own \(500\)"):
        list(download([TEACHER_NEED]))


def test_wrong_content_is_fetched_again_once(published: HubStub, tiny_dinov2: Path) -> None:
    true = (tiny_dinov2 / "model.safetensors").read_bytes()
    published.repositories[TEACHER].wrong = {"model.safetensors": [true[:-1] + b"x"]}
    list(download([TEACHER_NEED]))
    assert (fetch(TEACHER_NEED) / "model.safetensors").read_bytes() == true


def test_content_that_stays_wrong_is_refused_by_name(published: HubStub, tiny_dinov2: Path) -> None:
    wrong = (tiny_dinov2 / "model.safetensors").read_bytes()[:-1] + b"x"
    published.repositories[TEACHER].wrong = {"model.safetensors": [wrong, wrong]}
    with pytest.raises(UserError, match=r"facebook/dinov2-small: model\.safetensors arrived 2 times with the wrong"):
        list(download([TEACHER_NEED]))
    # Nothing of it is kept, so the next start gets the true file.
    list(download([TEACHER_NEED]))
    assert lacking(fetch(TEACHER_NEED), [""]) == []


def test_two_downloads_at_once_transfer_each_file_once(published: HubStub, tiny_dinov2: Path) -> None:
    published.bytes_per_second = 2_000_000
    threads = [threading.Thread(target=lambda: list(download([TEACHER_NEED]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert published.sent == needed_bytes(tiny_dinov2)


def test_a_download_that_does_not_fit_is_refused_before_its_first_byte(
    published: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crepa_cli.hub.download.free_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"349\.1 kB to download into .*, 1\.0 kB free: make room"):
        list(download([TEACHER_NEED]))
    assert published.sent == 0


def test_an_expert_that_is_not_used_is_not_downloaded(
    stub: HubStub,
    open_tiny: OpenTiny,
    tiny_dinov2: Path,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(open_tiny("wan", "t2v").base.name)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index = files["model_index.json"].replace(
        b'"transformer":', b'"transformer_2": ["diffusers", "WanTransformer3DModel"],\n  "transformer":'
    )
    second = {
        path.replace("transformer/", "transformer_2/"): data for path, data in files.items() if "transformer/" in path
    }
    stub.add(WAN, folder).commits = [files | second | {"model_index.json": index}]
    stub.add(TEACHER, tiny_dinov2)
    monkeypatch.chdir(tmp_path)
    assert start(run_crepa, "--download-only") == 0
    taken = {path.name for path in fetch(Need(WAN, None, ("vae",))).iterdir()}
    assert taken == {"model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert not (tmp_path / "runs").exists()


MESSAGES = {
    "lora": (["pytorch_lora_weights.safetensors"], r"holds a LoRA; name the base model"),
    "original": (
        ["diffusion_pytorch_model.safetensors"],
        r"not in the layout of diffusers: use Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_repository_of_another_kind_says_what_to_take(stub: HubStub, tmp_path: Path, kind: str) -> None:
    files, message = MESSAGES[kind]
    (tmp_path / "other").mkdir()
    for name in files:
        (tmp_path / "other" / name).write_bytes(b"weights")
    stub.add("Wan-AI/Wan2.1-T2V-1.3B", tmp_path / "other")
    with pytest.raises(HubError, match=message):
        read_config("Wan-AI/Wan2.1-T2V-1.3B", "model_index.json")


@pytest.mark.usefixtures("published")
def test_a_mistyped_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(HubError, match=f"did you mean {WAN}\\?") as error:
        read_config("Wan-AI/Wan2.1-T2V-1.3B-Difusers", "model_index.json")
    assert "\n" not in str(error.value)


def test_a_revision_that_does_not_exist_is_named(published: HubStub) -> None:
    assert published.repositories
    with pytest.raises(HubError, match=f"{WAN} has no revision 'v2'"):
        read_config(WAN, "model_index.json", "v2")


@pytest.mark.parametrize("token", ["", "hf_secret"])
def test_a_gated_repository_names_its_page(published: HubStub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    published.repositories[WAN].gated = True
    with pytest.raises(HubError, match=f"accept its terms: do so on {published.address}/{WAN}") as error:
        read_config(WAN, "model_index.json")
    assert ("hf auth login" in str(error.value)) == (not token)


def test_a_fault_of_the_hub_is_not_blamed_on_the_network(published: HubStub) -> None:
    published.listing_statuses = [500, 502]
    with pytest.raises(HubUnreachableError, match=r"the Hub has a fault of its own \(502\): try again later"):
        read_config("owner/model", "model_index.json")


def test_a_forbidden_download_is_said_to_be_forbidden(published: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE forbids downloads: unset it"):
        read_config("owner/model", "model_index.json")
    assert published.requests == []


def test_a_silent_hub_is_asked_once_for_all_repositories(published: HubStub) -> None:
    published.silent = True
    for name in ("owner/model", "owner/other", "owner/third"):
        with pytest.raises(HubUnreachableError, match=f"{name} is not on this machine, and .* does not answer"):
            read_config(name, "model_index.json")
    assert set(asked(published)) == {"owner/model"}


def test_published_configurations_serve_without_the_hub(published: HubStub) -> None:
    published.silent = True
    assert read_config(WAN, "transformer/config.json")["num_layers"] == 30


def test_a_file_whose_name_leads_out_of_the_cache_is_left_out(published: HubStub, tmp_path: Path) -> None:
    published.repositories[TEACHER].commits[0] |= {
        "../../../evil.json": b"{}",
        "a\\..\\b.json": b"{}",
        "/c.json": b"{}",
    }
    files = question.list_files(TEACHER).files
    assert {"config.json", "model.safetensors"} <= files.keys()
    assert not [path for path in files if ".." in path or path.startswith("/")]
    list(download([TEACHER_NEED]))
    assert not list(tmp_path.rglob("evil.json"))


def test_the_token_goes_to_the_hub(published: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    list(download([TEACHER_NEED]))
    assert all(request.authorized for request in published.requests if "agent" not in request.path)


def test_weights_are_those_that_from_pretrained_reads() -> None:
    paths = [
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00001.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors.index.json",
        "text/config.json",
        "text/model.safetensors",
        "text/model.safetensors.index.json",
        "text/spiece.model",
        "text/spiece.txt.md",
    ]
    shards = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]

    def read_index(_: str) -> object:
        return {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}

    # diffusers prefers the shards of an index to one file, transformers the other way round.
    assert weight_files(paths, "vae", read_index) == [paths[1], *(f"vae/{shard}" for shard in shards)]
    assert weight_files(paths, "text", read_index) == ["text/model.safetensors"]
    assert small_files(paths, "vae") == ["vae/config.json"]
    assert small_files(paths, "text") == ["text/config.json", "text/spiece.model"]


def test_a_local_folder_without_weights_is_named_before_anything_is_read(tiny_dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_dinov2 / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"is not complete: it lacks .*weights"):
        list(download([Need(str(tmp_path), None, ("",))]))


def command(stub: HubStub, folder: Path, *more: str) -> subprocess.Popen[str]:
    """`crepa train` of the demo's clips with the models of the stub, as a process of its own."""
    environment = os.environ | {"HF_ENDPOINT": stub.address, "HF_HOME": str(folder / "hf"), "PYTHONUNBUFFERED": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    arguments = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", "1", "--checkpoint", WAN]
    arguments += ["--set", "crepa.encoder_image_size=56"]
    return subprocess.Popen(
        [*CREPA, "train", *arguments, "--set", f"crepa.encoder={TEACHER}", "--set", "validation.every=0", *more],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
def test_a_signal_ends_a_download_in_a_moment(published: HubStub, tmp_path: Path) -> None:
    published.bytes_per_second = 20_000
    process = command(published, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("downloading:"):
            break
    time.sleep(2)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, output
    # Python itself takes a second to end after torch was imported, and longer on a busy machine.
    assert max(request.sent_at for request in published.requests) - before < 2
    assert time.monotonic() - before < 10
    sent = published.sent
    published.bytes_per_second = None
    process = command(published, tmp_path, "--download-only")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    total = sum(len(data) for repository in published.repositories.values() for data in repository.commits[0].values())
    total -= sum(map(len, [*WAN_DECOYS.values(), *TEACHER_DECOYS.values()]))
    # What was on its way when the signal came is transferred again.
    assert total <= published.sent <= total + min(sent, 4 * 64 * 1024)


@pytest.mark.slow
def test_a_slow_download_is_seen_in_plain_lines(published: HubStub, tmp_path: Path) -> None:
    published.bytes_per_second = 100_000
    process = command(published, tmp_path, "--download-only")
    assert process.stdout is not None
    times = [(time.monotonic(), line) for line in process.stdout if line.startswith("downloading:")]
    process.communicate()
    assert process.returncode == 0
    assert max(after - before for (before, _), (after, _) in pairwise(times)) < 12
    assert any("kB/s" in line and "left" in line and "%" in line for _, line in times)


@pytest.mark.slow
def test_a_silent_hub_and_an_empty_cache_end_in_one_message(published: HubStub, tmp_path: Path) -> None:
    published.silent = True
    process = command(published, tmp_path)
    output, _ = process.communicate()
    # Counted from the first question, because the imports before it take as long as the machine is slow.
    assert time.monotonic() - published.requests[0].at < 20
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert f"{WAN} is not on this machine, and {published.address} does not answer" in output
