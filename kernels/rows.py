"""What the operators that work row by row share: tiles of rows, and sums over all rows.

A program works on tiles of BLOCK_M rows and BLOCK_H columns. Offsets are 64 bits: row · stride may exceed 2³¹.

The gradient of a weight or a bias is a sum over all rows. Each program of the backward adds up its own rows in
registers and writes one float32 row of partial sums; `rows_sum_partials` adds these in a fixed order. There are no
atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import tl, triton
from .dropout import dropout_keep


class Config(NamedTuple):
    """Tile and warps of one kernel; ``stages``: tiles that a loop over tiles has in flight."""

    rows: int  # BLOCK_M
    columns: int  # BLOCK_H, a power of two
    num_warps: int
    stages: int = 1


@triton.jit
def row_tile(tile, stride, num_rows, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, first_column=0):
    """(offsets, mask) of a tile in a tensor with rows stride elements apart, each [BLOCK_M, BLOCK_H].

    A stride of None is H, a constant of the compiler: rows of H = 1000 elements still start at multiples of 16 bytes.
    """
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    row_offsets = tl.cast(rows, tl.int64) * (H if stride is None else stride)  # [BLOCK_M]
    return row_offsets[:, None] + columns[None, :], (rows[:, None] < num_rows) & (columns[None, :] < H)


@triton.jit
def row_keep(seed, p_threshold, tile, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, first_column=0):
    """`dropout_keep` of a tile, [BLOCK_M, BLOCK_H] booleans."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    keep = dropout_keep(seed, p_threshold, rows, BLOCK_M, BLOCK_H, first_column)  # [BLOCK_M, BLOCK_H]
    if H % BLOCK_H != 0:
        keep = keep & (columns[None, :] < H)  # lets the compiler drop the random words of registers without a column
    return keep


@triton.jit
def sum_of_programs(partial_ptr, columns, num_programs, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C]: the sum of partial [P, H] over its rows, in these columns."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, num_programs, BLOCK_P):
        programs = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask = (programs[:, None] < num_programs) & (columns[None, :] < H)  # [BLOCK_P, BLOCK_C]
        acc += tl.load(partial_ptr + programs[:, None] * H + columns[None, :], mask=mask, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["num_programs"])
def rows_sum_partials(
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
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    if a_partial_ptr is not None:
        total = sum_of_programs(a_partial_ptr, columns, num_programs, H, BLOCK_P, BLOCK_C)  # [BLOCK_C]
        tl.store(a_ptr + columns, total.to(a_ptr.dtype.element_ty), mask=columns < H)
    if b_partial_ptr is not None:
        total = sum_of_programs(b_partial_ptr, columns, num_programs, H, BLOCK_P, BLOCK_C)  # [BLOCK_C]
        tl.store(b_ptr + columns, total.to(b_ptr.dtype.element_ty), mask=columns < H)
    if c_partial_ptr is not None:
        total = sum_of_programs(c_partial_ptr, columns, num_programs, H, BLOCK_P, BLOCK_C)  # [BLOCK_C]
        tl.store(c_ptr + columns, total.to(c_ptr.dtype.element_ty), mask=columns < H)


def empty_partials(num_programs: int, columns: int, wanted: bool, device: torch.device) -> Tensor | None:
    """[P, columns] float32 for the programs' partial sums, or None where the gradient is not wanted."""
    return torch.empty((num_programs, columns), dtype=torch.float32, device=device) if wanted else None


def launch_sum_partials(sums: Sequence[tuple[Tensor | None, Tensor]]) -> None:
    """For up to three pairs (partial [P, H] float32 or None, total [H]): total = Σ over programs, in one launch."""
    partials = [partial for partial, _ in sums if partial is not None]
    totals = [total for partial, total in sums if partial is not None]
    if not partials:
        return
    num_programs, hidden_size = partials[0].shape
    absent = [None] * (3 - len(partials))
    block_c = 16
    rows_sum_partials[(triton.cdiv(hidden_size, block_c),)](
        *partials,
        *absent,
        *totals,
        *absent,
        num_programs,
        H=hidden_size,
        BLOCK_P=256,
        BLOCK_C=block_c,
        num_warps=8,
        enable_fp_fusion=True,
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def most_programs(device: torch.device, num_warps: int) -> int:
    """16 warps a multiprocessor; on a CPU, where the interpreter runs the programs, 4 of them."""
    return multiprocessors(device) * (16 // num_warps) if device.type == "cuda" else 4


def num_programs_for(device: torch.device, num_tiles: int, num_warps: int) -> int:
    """How many programs a backward has: `most_programs`, and no more than there are tiles.

    More programs hide latency better, but each writes a row of partial sums. The number depends on the device and the
    shape only, so the order of summation does too.
    """
    return min(num_tiles, most_programs(device, num_warps))


def as_rows(x: Tensor, hidden_size: int) -> Tensor:
    """[.., H] as [M, H] with adjacent columns; a view where one exists, else a copy."""
    rows = x.reshape(-1, hidden_size)
    return rows if rows.stride(1) == 1 or hidden_size == 1 else rows.contiguous()


def row_stride(rows: Tensor | None) -> int | None:
    """Elements from row to row of [M, H]; None, which stands for H, where the rows are contiguous."""
    return None if rows is None or rows.shape[0] == 1 or rows.stride(0) == rows.shape[1] else rows.stride(0)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def empty_gradient(like: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor:
    """An uninitialised gradient for ``parameter``, or [0] of like's dtype where it is not wanted."""
    if parameter is None or not wanted:
        return like.new_empty(0)
    return parameter.new_empty(parameter.shape)
