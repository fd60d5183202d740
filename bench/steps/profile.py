"""Where the time of a step goes: the time of each operator, beside the least that the machine's measured rates allow.

Every operator that reaches the dispatcher is labelled, forward and backward, and timed by PyTorch's profiler (on a GPU
the time of the kernels it launched). Its work follows from its arguments. FLOPs of products are counted by PyTorch's
formulas, and for our operators by the formulas below. Each input is read once and each output written once; a lookup
reads the rows that it takes, not the table.

floor = max(FLOPs / matmul rate, bytes / copy rate); roofline = floor / time
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..measure.case import Cost
from ..measure.ceilings import Ceilings
from ..measure.result import Profile, ProfiledOperator

LABEL = "fusebert_step::"
AT_ROOFLINE = 0.8  # operators above this share of the roofline are not listed for improvement
# These overwrite an argument without reading it.
WRITTEN_ONLY = (
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
    "aten::bernoulli_",
    "aten::_foreach_copy_",
    "aten::random_",
)
# These read only some rows of an argument.
LOOKUPS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index")


def _sum_of_products(cu_q: Tensor, cu_k: Tensor) -> int:
    return int((cu_q.diff().long() * cu_k.diff().long()).sum())


def _attention_qkv(factor: int) -> Callable[..., int]:
    def flops(qkv: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
        return factor * _sum_of_products(cu_seqlens, cu_seqlens) * qkv.shape[2] * qkv.shape[3]

    return flops


def _attention(factor: int) -> Callable[..., int]:
    def flops(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, *_: Any, **__: Any) -> int:
        if cu_q is None or cu_k is None:  # [B, H, N, D]
            return factor * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return factor * _sum_of_products(cu_q, cu_k) * q.shape[1] * q.shape[2]

    return flops


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    need_hidden, need_weight = rest[-3:-1]
    return 2 * hidden.shape[0] * hidden.shape[1] * weight.shape[0] * (1 + bool(need_hidden) + bool(need_weight))


# FLOPs. Attention: two products forward; backward four, and the scores once more.
OURS: Mapping[str, Callable[..., int]] = {
    "fusebert::attention_qkv": _attention_qkv(4),
    "fusebert::attention_qkv_backward": _attention_qkv(10),
    "fusebert::attention": _attention(4),
    "fusebert::attention_backward": _attention(10),
    "fusebert::linear_cross_entropy": _linear_cross_entropy,
}


def _size(value: Any) -> int:
    """Bytes of the tensors in ``value``; of an expanded tensor, those of its storage."""
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


def bytes_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    schema = func._schema
    given = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    total = 0
    for argument in schema.arguments:
        size = _size(given.get(argument.name))
        written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        if written:
            total += size * (1 if schema.name in WRITTEN_ONLY else 2)
        elif schema.name in LOOKUPS and argument.name in ("weight", "self"):
            total += _size(out)
        else:
            total += size
    returned = out if isinstance(out, tuple | list) else (out,)
    fresh = [x for x, r in zip(returned, schema.returns, strict=False) if r.alias_info is None]
    return total + _size(fresh)


def is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def label_of(func: Any, args: tuple[Any, ...]) -> str:
    """The operator's name; products by their shape, M × K × N."""
    name = func._schema.name.removeprefix("aten::")
    if name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm"):
        a, b = [x for x in args if isinstance(x, Tensor)][-2:] if name != "_scaled_mm" else args[:2]
        batch = f"{a.shape[0]} × " if a.ndim == 3 else ""
        return f"{name} {batch}{a.shape[-2]} × {a.shape[-1]} × {b.shape[-1]}"
    return str(name)


@dataclasses.dataclass
class _Count:
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


class _Labels(TorchDispatchMode):
    """Labels every operator that is not a view, and counts its work."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, _Count] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func) or func._schema.name.startswith("prim::"):
            return func(*args, **kwargs)
        label = label_of(func, args)
        with record_function(LABEL + label):
            out = func(*args, **kwargs)
        count = self.counts.setdefault(label, _Count())
        count.calls += 1
        count.bytes += bytes_of(func, args, kwargs, out)
        formula = OURS.get(func._schema.name)
        if formula is not None:
            count.flops += formula(*args, **kwargs)
        elif func._overloadpacket in flop_registry:
            count.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def profile_step(step: Callable[[int], Any], device: torch.device, ceilings: Ceilings, *, steps: int = 4) -> Profile:
    """Runs ``step`` (which takes the batch's number) ``steps`` times under the profiler.

    Returns:
        A step's share of everything.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    labels = _Labels()
    # A label has one event for the CPU and one for the GPU; the CPU's event has the time of the kernels it launched.
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        with labels:
            for i in range(steps):
                step(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - begin) / steps
    found = []
    for event in profiler.key_averages():
        if not event.key.startswith(LABEL) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        name = event.key.removeprefix(LABEL)
        microseconds = event.device_time_total if device.type == "cuda" else event.cpu_time_total
        count, ms = labels.counts[name], 1e-3 * microseconds / steps
        floor = Cost(flops=count.flops / steps, bytes=count.bytes / steps).floor(ceilings)
        roofline = floor.floor_ms / ms if ms else None
        found.append(ProfiledOperator(name, count.calls / steps, ms, floor, roofline, None))
    found.sort(key=lambda row: -row.ms)
    in_operators = sum(row.ms for row in found)
    if in_operators:
        found = [dataclasses.replace(row, share=row.ms / in_operators) for row in found]
    return Profile(wall, in_operators, tuple(found))


def to_do(profiled: Profile) -> list[ProfiledOperator]:
    """Operators below `AT_ROOFLINE` that lose at least 1 % of the time, the largest loss first."""
    rows = [row for row in profiled.operators if row.roofline is not None and row.roofline < AT_ROOFLINE]
    rows = [row for row in rows if row.lost_ms >= 0.01 * profiled.operator_ms]
    return sorted(rows, key=lambda row: -row.lost_ms)
