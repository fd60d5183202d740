"""Checks that weights and moments are finite, in one fused reduction on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LARGEST = 1e18  # of a weight: the square of a larger one overflows in float32


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """max |x| over all floating-point values, a scalar on their device; NaN if one is NaN. Does not synchronise.

    Of a DTensor only this process's shard is read.
    """
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    local = [each.detach() for each in local if each.is_floating_point() and each.numel()]
    if not local:
        return torch.zeros(())
    norms: list[Tensor] = list(torch._foreach_norm(local, float("inf")))
    return torch.stack([norm.float() for norm in norms]).max()


def blown_up(tensors: Mapping[str, Tensor], limit: float = LARGEST) -> str | None:
    """The name of the first tensor with a value that is not finite or larger than ``limit``; None if there is none.

    Waits for the device.
    """
    if float(largest(tensors.values())) <= limit:
        return None
    return next(name for name, each in tensors.items() if not float(largest([each])) <= limit)
