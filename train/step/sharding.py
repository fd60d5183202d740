"""A model over several processes: replicated (DDP) or sharded (FSDP2), with PyTorch's implementations.

    ddp    every process holds all weights; gradients are summed in buckets during the backward
    fsdp   every process holds 1/R of each weight, gradient and moment; the weights of a layer are gathered before it
           runs and freed after it; its gradients are reduce-scattered (Rajbhandari et al. 2020, ZeRO-3)

Both *sum* gradients: each process divides its loss by the label counts of the global batch, so the sum is the gradient
of the mean over all labelled positions. An average of the processes' means would weigh tokens unequally.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ...model.pretraining import BertForPreTraining
from .distributed import Ranks

PARALLEL = ("ddp", "fsdp")


def distribute(
    model: BertForPreTraining, device: torch.device, ranks: Ranks, parallel: str
) -> BertForPreTraining | DistributedDataParallel:
    """Moves ``model`` to ``device``, replicated or sharded, and returns the module to call in training.

    Evaluate, save and optimise ``model`` itself: it keeps its parameter names. With "fsdp" its parameters become
    DTensors, so create the optimiser afterwards.

    Args:
        model: on the CPU, with the same weights in every process.
        parallel: "ddp" or "fsdp"; not used by a single process.
    """
    if ranks.alone:
        return model.to(device)
    if parallel == "ddp":
        # Every parameter is used in every backward, so DDP need not search for unused ones.
        wrapped = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
        # A lambda, because DDP rejects the string annotations of a function in this module.
        wrapped.register_comm_hook(dist.group.WORLD, lambda group, bucket: _sum(group, bucket))
        return wrapped
    # Layers move to the device one at a time, and 1/R of each stays there. Embeddings (used again by the decoder) and
    # heads belong to the root module: they are gathered once for forward and backward.
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks.world_size,))
    for module in [*model.encoder.layers, model]:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo supports only sums
    return model


def _sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def accumulating(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Context of a micro-batch's forward and backward: DDP sums gradients over the processes in the last one only.

    FSDP sums in each micro-batch: to wait for the last, it would have to keep whole gradients instead of shards.

    Args:
        last: this is the last micro-batch of the step.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full value of a DTensor (a collective call); any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agree_on_largest(value: Tensor, model: nn.Module) -> Tensor:
    """The largest ``value`` of the processes that ``model`` is distributed over. A GPU's host does not wait."""
    if isinstance(model, DistributedDataParallel | FSDPModule):
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gather(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The full values on rank 0, those of sharded tensors on the CPU; an empty dict on the other ranks.

    Only one full tensor at a time is on the devices.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if ranks.first:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else tensor
    return gathered


def scatter(
    tensors: Mapping[str, Tensor], like: Callable[[str], Tensor | None], device: torch.device, ranks: Ranks
) -> dict[str, Tensor]:
    """The inverse of `gather`: the tensors of rank 0, in every process.

    Args:
        tensors: used on rank 0 only.
        like: maps a name to the tensor that the value is sharded like. A value of another shape is not sharded.
    """
    if ranks.alone:
        return dict(tensors)
    layout = ranks.from_first(lambda: {name: (x.shape, x.dtype) for name, x in tensors.items()})
    placed: dict[str, Tensor] = {}
    for name, (shape, dtype) in layout.items():
        source = tensors[name].to(device) if ranks.first else torch.empty(shape, dtype=dtype, device=device)
        model = like(name)
        if isinstance(model, DTensor) and model.shape == shape:
            placed[name] = distribute_tensor(source, model.device_mesh, model.placements)
        else:
            dist.broadcast(source, src=0)
            placed[name] = source
    return placed


def unsharded(model: BertForPreTraining, ranks: Ranks) -> BertForPreTraining | None:
    """On rank 0 a model that it can use alone: ``model``, or a full copy on the CPU if ``model`` is sharded.

    None on the other ranks. A collective call.
    """
    if not isinstance(model, FSDPModule):
        return model if ranks.first else None
    weights = gather(model.state_dict(), ranks)
    if not ranks.first:
        return None
    with torch.device("meta"):
        copy = BertForPreTraining(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy
