"""What a machine cannot do is said before the work begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crepa_cli.cli.launch import check_processes
from crepa_cli.errors import UserError
from crepa_cli.runs.capabilities import compile_mistakes, dtype_mistakes
from crepa_cli.settings import resolve

CHECK = """
import sys, torch
from crepa_cli.runs.capabilities import compile_mistakes
from crepa_cli.settings import resolve
profile = resolve("t2v", {"model.family": "wan"}, ["train.compile=true"]).profile
print(*compile_mistakes(profile, torch.device(sys.argv[1])), sep="\\n")
"""


def mistakes(device: str, **environment: str) -> str:
    """What a process with another environment says: torch asks for its compilers once."""
    command = [sys.executable, "-c", CHECK, device]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_compile_on_the_cpu_needs_a_compiler_of_cpp(tmp_path: Path) -> None:
    compiler = tmp_path / "some-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert mistakes("cpu", CXX=str(compiler)).strip() == ""
    told = mistakes("cpu", CXX=str(tmp_path / "no-compiler"))
    assert "train.compile" in told
    assert "g++" in told


@pytest.mark.slow
def test_compile_on_a_gpu_needs_triton(tmp_path: Path) -> None:
    """Another package stands for Triton where it is installed."""
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton')\n")
    told = mistakes("cuda", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert told.count("\n") == 1
    assert "train.compile" in told
    assert "pip install triton" in told


def test_triton_on_a_gpu_needs_a_c_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the question whether Triton takes this GPU is answered in its place: there is none."""
    monkeypatch.setattr("crepa_cli.runs.capabilities.has_triton", lambda: True)
    profile = resolve("t2v", {"model.family": "wan"}, ["train.compile=true"]).profile
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (told,) = compile_mistakes(profile, torch.device("cuda"))
    assert "Triton needs a C compiler" in told
    (tmp_path / "gcc").touch(0o755)
    assert not compile_mistakes(profile, torch.device("cuda"))
    (tmp_path / "gcc").unlink()
    monkeypatch.setenv("CC", "/opt/cc")
    assert not compile_mistakes(profile, torch.device("cuda"))


def test_what_is_not_compiled_needs_no_compiler() -> None:
    assert not compile_mistakes(resolve("t2v", {"model.family": "wan"}).profile, torch.device("cuda"))


def test_several_processes_need_a_gpu_each_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, on a torch for Windows, which has no NCCL."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_processes(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    check_processes(2)
    with pytest.raises(UserError, match="--processes 3: this machine has 2 GPUs"):
        check_processes(3)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    check_processes(1)
    with pytest.raises(UserError, match=r"--processes 2: this torch has no NCCL.*one process.*WSL2"):
        check_processes(2)


def test_a_gpu_without_bfloat16_is_refused_with_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 has compute capability 7.5, an RTX 3090 has 8.6."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    profile = resolve("t2v", {"model.family": "wan"}).profile
    full = resolve("t2v", {"model.family": "wan"}, ["model.dtype=float32"]).profile
    gpu = torch.device("cuda")
    for capability, mistakes in {(7, 5): 1, (8, 6): 0}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert len(dtype_mistakes(profile, gpu)) == mistakes
        assert not dtype_mistakes(full, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    (message,) = dtype_mistakes(profile, gpu)
    assert "Tesla T4" in message
    assert "Ampere generation or later" in message
    assert not dtype_mistakes(profile, torch.device("cpu"))
