"""Sharded processes read their own shares of the weights, hold what one process does, and reduce once per step."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import OpenTiny
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from test_int8_loading import changed
from test_memory import FEATURES, highest_level, settings
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from crepa_cli.alignment import TokenGrid
from crepa_cli.memory.savings import with_setting
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.family import Family
from crepa_cli.processes import start_processes
from crepa_cli.profile import Profile
from crepa_cli.training.checkpoints import whole_tensor
from crepa_cli.training.learner import build_learner
from crepa_cli.training.parallel import accumulating

PROCESSES = 2


def join(rank: int, port: int) -> Accelerator:
    """Join the processes of a test, as a launcher's processes do."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    start_processes()
    return Accelerator(cpu=True)


def in_processes(function: Any, *arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(function, (port, *arguments), nprocs=PROCESSES)


def weights(family: Family, profile: Profile, accelerator: Accelerator) -> dict[str, Tensor]:
    learner = build_learner(profile, family, FEATURES, accelerator, None, {})
    sharded = {name for name, weight in learner.aligned.named_parameters() if isinstance(weight, DTensor)}
    assert len(sharded) in (0, len(list(learner.aligned.parameters())))
    content = [*learner.aligned.named_parameters(), *learner.aligned.named_buffers()]
    return {name: whole_tensor(tensor.detach()) for name, tensor in content}


def compare_loading(rank: int, port: int, cases: list[tuple[str, str, dict[str, dict[str, Any]]]]) -> None:
    accelerator = join(rank, port)
    for name, folder, tables in cases:
        family = load_family(name)(folder, "t2v")
        whole = settings(family, **tables)
        shared = weights(family, with_setting(whole, "train", "sharding", True), accelerator)
        alone = build_learner(whole, family, FEATURES, accelerator, None, {}).aligned
        expected = dict(alone.named_parameters()) | dict(alone.named_buffers())
        assert shared.keys() == expected.keys()
        for key, tensor in expected.items():
            assert shared[key].dtype == tensor.dtype, key
            assert torch.equal(shared[key], tensor), key


@pytest.mark.slow
def test_shares_are_put_together_to_the_weights_of_one_process(open_tiny: OpenTiny) -> None:
    """LoRA and projector start from the same numbers, and buffers have their content."""
    kinds: list[dict[str, dict[str, Any]]] = [
        {"adapter": {"kind": "full"}},
        {"model": {"dtype": "bfloat16"}, "memory": {"quantize_base": "int8"}},
    ]
    cases = [(name, open_tiny(name, "t2v").base.name, tables) for name in FAMILIES for tables in kinds]
    in_processes(compare_loading, cases)


def accumulate(rank: int, port: int, folder: str) -> None:
    accelerator = join(rank, port)
    family = load_family("wan")(folder, "t2v").with_blocks(2)
    profile = with_setting(settings(family), "train", "sharding", True)
    vars(family)["hollow_transformer"] = lambda dtype, **_: family.empty_transformer(dtype)
    vars(family)["read_weights"] = lambda _: None
    learner = build_learner(profile, family, FEATURES, accelerator, None, {})
    generator = torch.Generator().manual_seed(rank)
    shapes = (2, 1, 4, 2, 8, 8), (2, 1, 3, 32), (1, 2, 9, FEATURES)
    latents, text, features = (torch.randn(shape, generator=generator) for shape in shapes)

    def backward(micro: int) -> None:
        inputs = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": text[micro]}
        grids = TokenGrid(2, 4, 4), TokenGrid(2, 3, 3)
        output = learner.model({"hidden_states": latents[micro]} | inputs, grids[0], features, grids[1])
        (output.prediction.square().mean() + output.alignment.loss).backward()

    def gradients() -> list[Tensor]:
        found = [whole_tensor(one.grad) for one in learner.trained if one.grad is not None]
        learner.discard_gradients()
        return found

    backward(0)
    backward(1)
    expected = gradients()
    with CommDebugMode() as first, accumulating(learner.model):
        backward(0)
    with CommDebugMode() as second:
        backward(1)
    reductions = [mode.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_] for mode in (first, second)]
    assert reductions[0] == 0
    assert reductions[1] > 0
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_gradients_of_a_lora_are_reduced_in_the_last_micro_batch_alone(open_tiny: OpenTiny) -> None:
    in_processes(accumulate, open_tiny("wan", "t2v").base.name)


def measure_loading(rank: int, port: int, folder: str, output: str) -> None:
    accelerator = join(rank, port)
    family = load_family("wan")(folder, "t2v")
    profile = with_setting(settings(family, model={"dtype": "bfloat16"}), "train", "sharding", True)
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        learner = build_learner(profile, family, FEATURES, accelerator, None, {})
    held = [weight.to_local() for weight in learner.aligned.parameters() if isinstance(weight, DTensor)]
    share = sum(tensor.nbytes for tensor in held)
    Path(output, str(rank)).write_text(json.dumps({"peak": highest_level(profiled), "share": share}))


@pytest.mark.slow
def test_loading_takes_the_share_of_a_process_and_one_file(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """The file is in float32: each process converts its own rows alone."""
    sizes = {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096}

    def larger(_: dict[str, Tensor], folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | sizes
        (folder / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            parameters = WanTransformer3DModel.from_config(config).state_dict()
        random = {name: torch.rand(parameter.shape) for name, parameter in parameters.items()}
        save_file(random, folder / "diffusion_pytorch_model.safetensors")

    family = changed(open_tiny("wan", "t2v"), tmp_path / "large", larger)
    file = family.base.weight_files("transformer")[0].stat().st_size
    in_processes(measure_loading, family.base.name, str(tmp_path))
    for rank in range(PROCESSES):
        measured = json.loads((tmp_path / str(rank)).read_text())
        assert measured["share"] > file / 5
        assert measured["peak"] <= 1.2 * measured["share"] + file
