"""A model over several processes: replicated (DDP) or in shards (FSDP2), by PyTorch's own engines.

    ddp    every process holds the weights; gradients are summed in buckets while the backward is still running
    fsdp   every process holds 1/R of each weight, gradient and moment; a layer's weights are gathered before it runs
           and let go after it, its gradients are summed into shards (Rajbhandari et al. 2020, ZeRO-3)

Both *sum* gradients: each process divides its loss by the counts of the whole global batch, so the sum is the gradient
of the mean over all labelled positions. (An average of the processes' means would weigh a token by its neighbours.)
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
    """Moves ``model``, which is on the CPU and the same in every process, to ``device``; what to call to train it.

    ``model`` itself stays what it was: evaluated, saved and optimised under its own names, for "fsdp" with
    parameters that are DTensors. An optimiser must be made afterwards.

    Args:
        parallel: "ddp" or "fsdp"; a process that is alone needs neither.
    """
    if ranks.alone:
        return model.to(device)
    if parallel == "ddp":
        # No static_graph, nor a search for unused parameters: each is used in every backward, which DDP assumes.
        wrapped = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
        # DDP reads a hook's annotations, and not as the strings that they are here: a lambda has none.
        wrapped.register_comm_hook(dist.group.WORLD, lambda group, bucket: _sum(group, bucket))
        return wrapped
    # A layer at a time goes to the device, and a 1/R of it stays there. What is left (embeddings, which the decoder
    # needs at the end again, and heads) is the root's: gathered once for forward and backward.
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks.world_size,))
    for module in [*model.encoder.layers, model]:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


def _sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def accumulating(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Around forward and backward of a micro-batch: DDP sums gradients over the processes after the ``last`` alone.

    FSDP does it after each: what it would have to keep until then are whole gradients, not shards.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full value, which takes every process; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The full values in the first process, sharded ones on the CPU; nothing in the others. One at a time is whole on
    the devices."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if ranks.first:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else tensor
    return gathered


def scatter(
    tensors: Mapping[str, Tensor], like: Callable[[str], Tensor | None], device: torch.device, ranks: Ranks
) -> dict[str, Tensor]:
    """The inverse of `gather`: ``tensors`` of the first process (those of the others are not looked at) in every one.

    Args:
        like: for a name, the tensor whose sharding the value shall have; a value of another shape is left whole.
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


def replica(model: BertForPreTraining, ranks: Ranks) -> BertForPreTraining | None:
    """``model`` for the first process to use by itself: a whole copy on the CPU where it is sharded. None in the
    others, which must take part."""
    if not isinstance(model, FSDPModule):
        return model if ranks.first else None
    weights = gather(model.state_dict(), ranks)
    if not ranks.first:
        return None
    with torch.device("meta"):
        copy = BertForPreTraining(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy


__all__ = ["PARALLEL", "accumulating", "distribute", "gather", "replica", "scatter", "whole"]
