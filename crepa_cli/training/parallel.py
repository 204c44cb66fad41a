"""One model over several processes: a copy in each, or its weights shared out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from crepa_cli.errors import RunError, UserError
from crepa_cli.models.streaming import move
from crepa_cli.models.weights import make_empty
from crepa_cli.training.aligned import AlignedTransformer


def shard(aligned: AlignedTransformer, blocks: nn.ModuleList, accelerator: Accelerator) -> None:
    """Share out the weights over all processes, block by block, in place (FSDP2, arXiv 2304.11277).

    Transformer and projector are sharded apart, so that the projector can be dropped. Weights that are hollow are on
    the meta device afterwards, each process's share of them.

    Raises:
        UserError: if there is but one process.
        RunError: if a trained weight is not shared out afterwards.
    """
    if accelerator.num_processes == 1:
        raise UserError("train.sharding = true needs several processes: start them with --processes N, or turn it off")
    make_empty(aligned.transformer)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    roots = [aligned.transformer] + ([aligned.crepa] if aligned.crepa else [])
    for module in (*blocks, *roots):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    whole = [name for name, weight in aligned.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        raise RunError(f"train.sharding = true, but {len(whole)} weights are not sharded, such as {whole[0]}")


def describe_share(aligned: AlignedTransformer) -> str:
    """How much of a sharded module's weights this process holds."""
    weights = list(aligned.parameters())
    here = sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
    return f"this process holds {here:,} of {sum(weight.numel() for weight in weights):,} weights"


def replicated(aligned: AlignedTransformer, accelerator: Accelerator) -> nn.Module:
    """The aligned transformer on its device, as it is called: with several processes, a copy in each.

    Its parameters that are `on_host` stay there.

    A sharded one is returned as it is.
    """
    if isinstance(aligned.transformer, FSDPModule):
        return aligned
    move(aligned, accelerator.device, aligned.on_host)
    if accelerator.num_processes == 1:
        return aligned
    # Every process reads the weights on its host by itself, and no buffer changes in training.
    own = [name for name, parameter in aligned.named_parameters() if parameter in aligned.on_host]
    buffers = [name for name, _ in aligned.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(aligned, [*own, *buffers])
    devices = None if accelerator.device.type == "cpu" else [accelerator.local_process_index]
    return DistributedDataParallel(aligned, device_ids=devices)


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Within this context the gradients of a backward stay in each process; the next one outside reduces them too.

    Args:
        model: from `replicated`.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    sharded = [module for module in model.children() if isinstance(module, FSDPModule)]
    # Gradients that are not reduced are whole: in full tuning they would take what sharding saves.
    if any(not weight.requires_grad for weight in model.parameters()):
        for module in sharded:
            module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True)
