"""Every address that a kernel reads or writes, checked in Triton's interpreter against the tensors of its launch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def _tensors(arguments) -> Iterator[torch.Tensor]:
    for x in arguments:
        if isinstance(x, tuple):
            yield from _tensors(x)
        elif isinstance(x, torch.Tensor):
            yield x


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """[first byte, one past the last byte) of the elements of x."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class Outside(AssertionError):
    """A kernel accessed memory outside all tensors of its launch."""


def check_every_access(monkeypatch) -> list[int]:
    """An access outside the launch's tensors raises `Outside` within one test. Returns [launches so far]."""
    from triton.runtime import interpreter

    extents: list[tuple[int, int]] = []
    launches = [0]

    def init(self, args, kwargs):
        result = original_init(self, args, kwargs)
        extents[:] = sorted(map(_extent, _tensors([*result[0], *result[1].values()])))
        launches[0] += 1
        return result

    def check(what, pointers, mask):
        active = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.uint64)
        if not active.size:
            return
        size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        inside = np.zeros(active.shape, dtype=bool)
        for first, end in extents:
            inside |= (active >= np.uint64(first)) & (active + size <= np.uint64(end))
        if not inside.all():
            raise Outside(f"{what} of {np.count_nonzero(~inside)} of {active.size} elements outside the tensors")

    def load(self, pointers, mask, *rest):
        check("a load", pointers, mask.data)
        return original_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check("a store", pointers, mask.data)
        return original_store(self, pointers, value, mask, *rest)

    builder = interpreter.InterpreterBuilder
    original_init = interpreter.GridExecutor._init_args_hst
    original_load, original_store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", init)
    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    return launches
