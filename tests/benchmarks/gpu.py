"""Measures training on a machine with a GPU: `python tests/benchmarks/gpu.py [--output FOLDER] [--only PART ...]`.

Published configurations at their default sizes, random weights, no network, under eight minutes. Every part runs in a
process of its own, within a time of its own: one that fails or takes too long leaves the others alone. After each part
`gpu.json` and `gpu.md` hold all figures so far. `--tiny` runs the same on the CPU with tiny models, to test this file.

A step is one of the trainer's. FLOPs are those of the forward and backward, without what checkpointing recomputes; they
are held against the FLOPs of a large bfloat16 product on the same card (utilisation). Memory is the most bytes that
torch's allocator held, against the bytes that `crepa doctor` predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from steps import Plan, Settings, measure

from crepa_cli.heap import release_memory
from crepa_cli.libraries import silence_libraries
from crepa_cli.memory.fit import cheapest_fit
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models import load_family
from crepa_cli.models.attention import KERNELS
from crepa_cli.processes import start_processes

SECONDS = 460
"""Of all parts together: no part is started or goes on after that."""
WAN, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
KANDINSKY = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
NABLA = {
    "attention_type": "nabla",
    "attention_P": 0.9,
    "attention_wT": 11,
    "attention_wH": 3,
    "attention_wW": 3,
}
"""Squares of sparse attention; the values are not checked against a published model."""
CAP = 24 * 10**9

Row = dict[str, Any]
Plans = Mapping[str, Plan]


@dataclass(frozen=True)
class Bench:
    """Where it runs.

    Attributes:
        device: a GPU, or the CPU.
        folder: for files of the measurement.
        tiny: the folder of tiny checkpoints, named `<family>-t2v` and `dinov2`; None for published ones.
    """

    device: torch.device
    folder: Path
    tiny: Path | None

    def plan(self, family: str, checkpoint: str, settings: Settings, **others: Any) -> Plan:
        """A plan, on a published checkpoint or on a tiny one."""
        config = others.pop("config", {})
        if self.tiny is None:
            return Plan(family, checkpoint, settings, config, **others)
        first, *further = load_family(family).depth_settings
        depth = dict.fromkeys(further, 1) | {first: others.pop("blocks", 3)}
        sizes = {"width": 128, "height": 128} if config else {"width": 96, "height": 64}
        tables: dict[str, dict[str, object]] = {table: dict(values) for table, values in settings.items()}
        changes: dict[str, dict[str, object]] = {
            "adapter": {} if tables.get("adapter", {}).get("kind") == "full" else {"rank": 4},
            "crepa": {"encoder": str(self.tiny / "dinov2"), "encoder_image_size": 56, "block_index": 1},
            "data": {**sizes, "frames": 9},
        }
        tables |= {table: tables.get(table, {}) | values for table, values in changes.items()}
        return Plan(family, str(self.tiny / f"{family}-t2v"), tables, config | depth, **others | {"timed": 1})

    def wan(self, settings: Settings, **others: Any) -> Plan:
        """A plan of Wan 1.3B at 832x480, 81 frames."""
        return self.plan("wan", WAN, settings, **others)


@dataclass(frozen=True)
class Part:
    """A question, and how it is answered.

    Attributes:
        title: of its table.
        seconds: that it may take.
        plans: by name; the first one is what the seconds of the others are compared with.
        processes: that take part.
        cap: bytes that the allocator may hold on a GPU; None for all.
    """

    title: str
    seconds: int
    plans: Callable[[Bench], Plans]
    processes: int = 1
    cap: int | None = None


def alignment_plans(bench: Bench) -> Plans:
    """Wan 1.3B without alignment, with it, and with its teacher's features made in every step."""
    return {
        "without CREPA": bench.wan({"crepa": {"enabled": False}}),
        "with CREPA": bench.wan({}, cutoff=True),
        "decoding and encoding in every step": bench.wan({"crepa": {"teacher_cache": False}}, timed=2),
    }


def compiled_plans(bench: Bench) -> Plans:
    """Wan 1.3B with and without compilation."""
    compiled = {"train": {"compile": True}}
    return {
        "with CREPA": bench.wan({}, timed=2),
        "compiled": bench.wan(compiled, warmup=2),
        "compiled, without CREPA": bench.wan(compiled | {"crepa": {"enabled": False}}, warmup=2),
    }


def memory_plans(bench: Bench) -> Plans:
    """Wan 1.3B under each setting that saves memory, and under all that keep the numbers."""
    streamed, offloaded = {"stream_weights": True}, {"offload_activations": True}
    settings: dict[str, Mapping[str, object]] = {
        "as it is": {},
        "stream_weights": streamed,
        "offload_activations": offloaded,
        "both": streamed | offloaded,
        "finer_recompute": {"finer_recompute": True},
        "all three": streamed | offloaded | {"finer_recompute": True},
        "quantize_base": {"quantize_base": "int8"},
    }
    return {name: bench.wan({"memory": one}, timed=2) for name, one in settings.items()}


def speed_plans(bench: Bench) -> Plans:
    """Wan 1.3B with each kernel of attention, and with memory spent on what is not recomputed."""
    kernels = {name: bench.wan({"train": {"attention": name}}, timed=2) for name in KERNELS}
    kept: dict[str, Mapping[str, object]] = {"keep": {"keep": "attention"}, "keep_blocks": {"keep_blocks": 8}}
    return kernels | {name: bench.wan({"memory": one}, timed=2) for name, one in kept.items()}


def family_plans(bench: Bench) -> Plans:
    """A LoRA on each other family at its default size, image to video, larger batches, full tuning."""
    short = {"data": {"frames": 33}}
    return {
        "Wan 1.3B, 33 frames": bench.wan(short, timed=2),
        "Wan 1.3B, 33 frames, batch of 2": bench.wan(short | {"train": {"batch_size": 2}}, timed=2),
        "LTX-Video 2B": bench.plan("ltxvideo", "Lightricks/LTX-Video", {}, timed=2),
        "SANA-Video 2B": bench.plan("sanavideo", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers", {}, timed=2),
        "LTX-Video 2B, all weights": bench.plan(
            "ltxvideo", "Lightricks/LTX-Video", {"adapter": {"kind": "full"}}, timed=2
        ),
        "Kandinsky 5 Lite": bench.plan("kandinsky5_video", KANDINSKY, {}, timed=2),
    }


def optimizer_plans(bench: Bench) -> Plans:
    """All weights of Wan 1.3B at a small size, with the optimizer's state in 32 and in 8 bits."""
    small: dict[str, Mapping[str, object]] = {"adapter": {"kind": "full"}, "data": {"frames": 17}}
    return {name: bench.wan(small | {"train": {"optimizer": name}}, timed=2) for name in ("adamw", "adamw8bit")}


def sparse_plans(bench: Bench) -> Plans:
    """Kandinsky 5 Lite with its attention, and with NABLA's squares."""
    nabla = {"config": NABLA, "warmup": 2, "timed": 2}
    compiled = {"train": {"compile": bench.tiny is None}}
    return {
        "full attention": bench.plan("kandinsky5_video", KANDINSKY, {}, timed=2),
        "NABLA, compiled": bench.plan("kandinsky5_video", KANDINSKY, compiled, **nabla),
    }


def process_plans(bench: Bench) -> Plans:
    """Wan 1.3B on two cards: a copy in each, and the weights shared out."""
    return {
        "a copy on each card": bench.wan({}, timed=2),
        "sharded": bench.wan({"train": {"sharding": True}}, timed=2),
    }


def large_plans(bench: Bench) -> Plans:
    """Wan 14B at 832x480, 81 frames, with the settings that `crepa doctor --fit 24` finds."""
    plan = bench.plan("wan", LARGE, {}, timed=1)
    profile = plan.profile()
    family = plan.open_family(profile, bench.device)
    fit = cheapest_fit(profile, family, form_bucket(profile, family), torch.device("cuda"), CAP)
    if fit is None:
        return {"nothing fits": plan}
    tables = {table: dict(values) for table, values in plan.settings.items()}
    for table, key, value in fit.settings:
        tables[table] = tables.get(table, {}) | {key: value}
    return {str(fit) or "as it is": replace(plan, settings=tables)}


PARTS = {
    "alignment": Part("Wan 1.3B, 832x480, 81 frames: what alignment costs", 100, alignment_plans),
    "large": Part("Wan 14B, 832x480, 81 frames, in 24 GB", 130, large_plans, cap=CAP),
    "memory": Part("Wan 1.3B, 832x480, 81 frames: what each memory setting costs", 110, memory_plans),
    "speed": Part("Wan 1.3B, 832x480, 81 frames: kernels of attention, and what is kept", 90, speed_plans),
    "families": Part("Other models at their default sizes", 90, family_plans),
    "optimizer": Part("Wan 1.3B, all weights, 832x480, 17 frames: 8-bit AdamW", 50, optimizer_plans),
    "sparse": Part("Kandinsky 5 Lite, 768x512, 121 frames: NABLA", 90, sparse_plans),
    "compiled": Part("Wan 1.3B, 832x480, 81 frames: torch.compile", 110, compiled_plans),
    "processes": Part("Wan 1.3B, 832x480, 81 frames, on two cards", 60, process_plans, processes=2),
}
"""The most important first: those that are left when the time is over are not measured."""


def run_part(part: Part, bench: Bench) -> Iterator[Row]:
    """Measure each plan of a part; one that fails has its reason in place of figures."""
    if part.cap is not None and bench.device.type == "cuda":
        share = part.cap / torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), bench.device)
    for name, plan in part.plans(bench).items():
        names = [name, f"{name}, after the cutoff"]
        try:
            for shown, measured in zip(names, measure(plan, bench.device, bench.folder), strict=False):
                yield {"plan": shown, **measured.to_json()}
        # Out of memory, a missing package, a setting of another version: the other plans are measured all the same.
        except Exception as error:
            yield {"plan": name, "failure": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            if PartialState().num_processes > 1:
                return  # the others wait for this one
        release_memory()


def card(device: torch.device) -> dict[str, Any]:
    """The card's name and memory, and the FLOPs per second of a large product of matrices in bfloat16."""
    on_gpu = device.type == "cuda"
    side, rounds = (8192, 20) if on_gpu else (256, 3)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    facts: dict[str, Any] = {"name": "CPU", "torch": torch.__version__, "flops": 2 * side**3 / statistics.median(times)}
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def table(part: Part, rows: list[Row], flops: float) -> str:
    """The rows as a Markdown table.

    Args:
        part: what they answer.
        rows: of `run_part`.
        flops: of the card, per second.
    """
    lines = [
        f"### {part.title}",
        "",
        "| plan | s per step | relative | TFLOP | utilisation | peak GB | predicted GB | measured / predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = rows[0].get("seconds") if rows else None
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['plan']} | {row['failure'].replace('|', '/')} |")
            continue
        seconds, peak, predicted = row["seconds"], row["peak"], row["predicted"]
        relative = f"x {seconds / first:.3f}" if first else "-"
        work, share = "-", "-"
        if row["flops"]:
            work, share = f"{row['flops'] / 1e12:.1f}", f"{row['flops'] / seconds / flops:.0%}"
        sizes = f"{peak / 1e9:.2f} | {predicted / 1e9:.2f} | {peak / predicted:.3f}"
        lines.append(f"| {row['plan']} | {seconds:.3f} | {relative} | {work} | {share} | {sizes} |")
    return "\n".join(lines)


def write_report(results: Mapping[str, Any], output: Path) -> None:
    """Write `gpu.json` and `gpu.md`."""
    output.mkdir(parents=True, exist_ok=True)
    facts = results["card"]
    heading = f"{facts['name']}, torch {facts['torch']}, {facts['flops'] / 1e12:.0f} TFLOP/s in bfloat16 products"
    tables = [table(PARTS[name], rows, facts["flops"]) for name, rows in results["parts"].items()]
    (output / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text("\n\n".join([heading, *tables]) + "\n", encoding="utf-8")


def start_part(name: str, rows_file: Path, seconds: float | None, tiny: Path | None) -> list[Row]:
    """Run a part in processes of its own, and return its rows; a last one says why some are missing.

    Args:
        name: of the part.
        rows_file: that it writes its rows to.
        seconds: after which it is stopped; None for never.
        tiny: as in `Bench`; then on the CPU.
    """
    launcher = [sys.executable]
    if (count := PARTS[name].processes) > 1:
        if tiny is None and torch.cuda.device_count() < count:
            return [{"plan": "all", "failure": f"needs {count} cards"}]
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"ACCELERATE_USE_CPU": "true"} if tiny else {})
    command = [
        *launcher,
        __file__,
        "--part",
        name,
        "--rows",
        str(rows_file),
        *(["--models", str(tiny)] if tiny else []),
    ]
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait(seconds)
        failure = f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        failure = f"stopped after {seconds:.0f} s"
        process.terminate()  # a launcher that is killed leaves its processes behind
        process.wait()
    rows: list[Row] = json.loads(rows_file.read_text(encoding="utf-8")) if rows_file.exists() else []
    return rows if failure is None else [*rows, {"plan": "the rest", "failure": failure}]


def write_rows(name: str, rows_file: Path, tiny: Path | None) -> None:
    """Run a part in this process, and write its rows after each one."""
    silence_libraries()
    state = start_processes()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(state.device, Path(folder), tiny)
        rows: list[Row] = []
        for row in run_part(PARTS[name], bench):
            rows.append(row)
            if PartialState().is_main_process:
                rows_file.write_text(json.dumps(rows), encoding="utf-8")
                print(json.dumps(row), flush=True)


def write_tiny_models(folder: Path) -> Path:
    """Tiny checkpoints of all families and a tiny teacher, for `Bench.tiny`."""
    from crepa_cli.demo import write_tiny
    from crepa_cli.demo.teacher import write_tiny_dinov2
    from crepa_cli.models import FAMILIES

    for family in FAMILIES:
        write_tiny(family, folder / f"{family}-t2v", "t2v")
    write_tiny_dinov2(folder / "dinov2")
    return folder


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        write_rows(given.part, given.rows, given.models)
        return
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    results: dict[str, Any] = {"card": card(device), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_models(Path(folder)) if given.tiny else None
        for name in given.only:
            left = min(PARTS[name].seconds, started + SECONDS - time.monotonic())
            print(f"{PARTS[name].title}:", flush=True)
            if left < 10 and not given.tiny:
                rows = [{"plan": "all", "failure": "no time was left"}]
            else:
                rows = start_part(name, Path(folder) / f"{name}.json", None if given.tiny else left, tiny)
            results["parts"][name] = rows
            write_report(results, given.output)
            print(table(PARTS[name], rows, results["card"]["flops"]), flush=True)


if __name__ == "__main__":
    main()
