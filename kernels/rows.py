"""What operators that work row by row share: tiles of rows, how many programs, and the sum of their partial sums.

A program works on tiles of BLOCK_M rows by BLOCK_H ≥ H columns. Offsets are 64 bits: row · stride may pass 2³¹.

A backward that sums over all rows (the gradient of a weight or a bias) gives each program some rows, which leaves a
float32 row of partial sums; `sum_partials` adds these in a fixed order. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import tl, triton
from .dropout import dropout_keep


@triton.jit
def row_tile(tile, stride, num_rows, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, first_column=0):
    """(offsets, mask) of a tile in a tensor whose rows are stride elements apart, each [BLOCK_M, BLOCK_H]."""
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_H)
    # A stride of None is H, known when compiling: rows of H = 1000 elements still begin at multiples of 16 bytes.
    row_offsets = tl.cast(rows, tl.int64) * (H if stride is None else stride)
    return row_offsets[:, None] + columns[None, :], (rows[:, None] < num_rows) & (columns[None, :] < H)


@triton.jit
def row_keep(seed, p_threshold, tile, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, first_column=0):
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_H)
    keep = dropout_keep(seed, p_threshold, rows, BLOCK_M, BLOCK_H, first_column)
    if H % BLOCK_H != 0:
        keep = keep & (columns[None, :] < H)  # so that no word is drawn for a register that holds no column
    return keep


@triton.jit
def _sum_columns(partial_ptr, columns, num_programs, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, num_programs, BLOCK_P):
        programs = start + tl.arange(0, BLOCK_P)
        mask = (programs[:, None] < num_programs) & (columns[None, :] < H)
        acc += tl.load(partial_ptr + programs[:, None] * H + columns[None, :], mask=mask, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["num_programs"])
def sum_partials(
    a_partial_ptr,  # [P, H] float32, or None
    b_partial_ptr,
    c_partial_ptr,
    a_ptr,  # [H]
    b_ptr,
    c_ptr,
    num_programs,
    H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if a_partial_ptr is not None:
        total = _sum_columns(a_partial_ptr, columns, num_programs, H, BLOCK_P, BLOCK_C)
        tl.store(a_ptr + columns, total.to(a_ptr.dtype.element_ty), mask=columns < H)
    if b_partial_ptr is not None:
        total = _sum_columns(b_partial_ptr, columns, num_programs, H, BLOCK_P, BLOCK_C)
        tl.store(b_ptr + columns, total.to(b_ptr.dtype.element_ty), mask=columns < H)
    if c_partial_ptr is not None:
        total = _sum_columns(c_partial_ptr, columns, num_programs, H, BLOCK_P, BLOCK_C)
        tl.store(c_ptr + columns, total.to(c_ptr.dtype.element_ty), mask=columns < H)


def launch_sum_partials(sums: Sequence[tuple[Tensor | None, Tensor]]) -> None:
    """For up to three pairs (partial [P, H] float32 or None, total [H]): total = Σ over programs, in one launch."""
    partials = [partial for partial, _ in sums if partial is not None]
    totals = [total for partial, total in sums if partial is not None]
    if not partials:
        return
    num_programs, hidden_size = partials[0].shape
    none = [None] * (3 - len(partials))
    block_c = 16
    sum_partials[(triton.cdiv(hidden_size, block_c),)](
        *partials, *none, *totals, *none, num_programs, H=hidden_size, BLOCK_P=256, BLOCK_C=block_c, num_warps=8
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs_for(device: torch.device, num_tiles: int, num_warps: int) -> int:
    """Programs of the backward. More hide latency better, and each leaves a row of partial sums to write and to read.

    A function of the device and the shape alone, so that the order of summation is too.
    """
    limit = multiprocessors(device) * (16 // num_warps) if device.type == "cuda" else 4
    return min(num_tiles, limit)


def as_rows(x: Tensor, hidden_size: int) -> Tensor:
    """[.., H] as [M, H] with adjacent columns, copied only where no view is that."""
    rows = x.reshape(-1, hidden_size)
    return rows if rows.stride(1) == 1 or hidden_size == 1 else rows.contiguous()


def row_stride(rows: Tensor | None) -> int | None:
    """None, which compiles to H, where rows are end to end."""
    return None if rows is None or rows.shape[0] == 1 or rows.stride(0) == rows.shape[1] else rows.stride(0)


__all__ = [
    "as_rows",
    "launch_sum_partials",
    "multiprocessors",
    "num_programs_for",
    "row_keep",
    "row_stride",
    "row_tile",
]
