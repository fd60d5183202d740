"""A training step or an operator without its arithmetic, on a CPU: which operators it calls, every launch of ours.

Tensors are real, but floating-point ones are allocated and never touched, so a step of BERT-large takes address space
and no memory. Products, sums and updates are skipped; integer operations run, because the paths of some kernels depend
on them. Our operators run their launchers within `compiled_kernels`, so each launch has the arguments it has on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ...kernels import use_backend
from ...model.batch import PackedBatch
from ...model.config import BertConfig
from ...model.pretraining import BertForPreTraining
from ..compiled.aot import Launch, compiled_kernels
from ..measure.gpus import GPU
from .contestants import our_step
from .profile import bytes_of, is_view, label_of

NO_KERNEL = ("aten::_local_scalar_dense", "aten::scalar_tensor", "aten::promote_types")  # on a GPU: of the CPU alone
RANDOM = ("aten::randn", "aten::rand")
MOST_INTEGERS = 1 << 24  # elements of an integer tensor up to which its operations run


@dataclasses.dataclass
class Calls:
    """Calls of an operator that is not ours."""

    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _untouched(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _skipped(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operator returns, without its values."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        outputs = [given[name] for name in written if name in given]
        return None if not func._schema.returns else outputs[0] if len(func._schema.returns) == 1 else tuple(outputs)
    options = tree_map(_on_meta, kwargs) | ({"device": "meta"} if "device" in kwargs else {})
    found = func(*tree_map(_on_meta, args), **options)
    return tree_map(_untouched, found)


class Dry(TorchDispatchMode):
    """Skips arithmetic and, when ``counting``, counts calls. ``operator``: of ours, the one that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Calls] = {}
        self.operator = ""
        self.counting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("fusebert::"):
            self.operator = name.removeprefix("fusebert::")
            cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:  # the operator's own products and sums are counted too
                return func.redispatch(cpu, *args, **kwargs)
        if is_view(func) or name.startswith(("prim::", "aten::empty", "aten::new_empty", "aten::detach")):
            return func(*args, **kwargs)
        if name in RANDOM:
            return torch.empty(args[0], dtype=kwargs.get("dtype"))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        integers = all(not x.is_floating_point() and x.numel() <= MOST_INTEGERS for x in tensors)
        out = func(*args, **kwargs) if integers else _skipped(func, args, kwargs)
        if self.counting and name.startswith("aten::") and name not in NO_KERNEL:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        label = label_of(func, args)
        calls = self.calls.setdefault(label, Calls())
        calls.count += 1
        calls.bytes += bytes_of(func, args, kwargs, out)
        if func._overloadpacket in flop_registry:
            options = {k: v for k, v in kwargs.items() if k != "out"}
            calls.flops += flop_registry[func._overloadpacket](*args, **options, out_val=out)


def write_integers(launch: Launch) -> None:
    """Writes the integers that a kernel leaves for the next ones: they decide what those do."""
    a = launch.arguments
    if launch.resources.name == "embed_layernorm_backward":  # the row of each token in the three tables
        first = 0
        for table in ("word", "type", "position"):
            if a[f"{table}_keys_ptr"] is not None:
                a[f"{table}_keys_ptr"].copy_(a[f"{table}_ids_ptr"].view(-1) + first)
            first += a[f"num_{table}s"]
    elif launch.resources.name == "attn_schedule_tiles":
        a["slots_ptr"].copy_(schedule(a["cu_seqlens_ptr"], a["num_slots"], a["num_rows"], a["BLOCK"]))


def schedule(cu_seqlens: Tensor, num_slots: int, num_rows: int, block: int) -> Tensor:
    """What attn_schedule_tiles writes: int32 [2, num_slots], each tile's segment and that segment's first slot.

    Longest segments first. The rows after the last segment are a segment without rows, with one tile.
    """
    rows = [*cu_seqlens.clamp(0, num_rows).diff().clamp(min=0).tolist(), 0]
    tiles = [-(-n // block) for n in rows[:-1]] + [1]
    slots = torch.full((2, num_slots), -1, dtype=torch.int32)
    first = 0
    for segment in sorted(range(len(rows)), key=lambda i: -rows[i]):
        slots[0, first : first + tiles[segment]] = segment
        slots[1, first : first + tiles[segment]] = first
        first += tiles[segment]
    return slots


@contextlib.contextmanager
def dry(gpu: GPU, observe: Callable[[str, Launch], None]) -> Iterator[Dry]:
    """Within the block nothing is computed on CPU tensors and our operators compile for ``gpu``.

    Args:
        observe: takes our operator and its launch, at each launch while ``counting``.
    """
    mode = Dry()

    def launched(launch: Launch) -> None:
        with _disable_current_modes():
            write_integers(launch)
        if mode.counting:
            with _disable_current_modes():
                observe(mode.operator, launch)

    with use_backend("triton"), compiled_kernels(gpu.arch, launched, gpu.multiprocessors), mode:
        yield mode


def dry_step(
    config: BertConfig,
    batch: PackedBatch,
    dtype: torch.dtype,
    gpu: GPU,
    observe: Callable[[str, Launch], None],
) -> dict[str, Calls]:
    """One optimiser step of one micro-batch, after a step that makes the optimiser's state.

    Args:
        observe: as of `dry`.

    Returns:
        The calls of all operators that are not ours, those within ours too, by name.
    """
    with torch.device("meta"):
        shapes = BertForPreTraining(config)
    model = shapes.to_empty(device="cpu").train()
    step = our_step(model, dtype)
    with dry(gpu, observe) as mode:
        for mode.counting in (False, True):
            step([batch], 1e-4)
    return mode.calls
