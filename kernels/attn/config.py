"""Tile sizes, warps and pipeline stages of attention's kernels, by shape and architecture.

The tables hold, for each kernel, the largest tiles that compile without spilling a register and fit the shared memory,
with dropout and without: what a compiler can say (`bench.tune` derives them, tests/bench/compiled/test_aot_attention.py
holds every entry to it). They are not yet tuned by the clock. Their keys are BLOCK_D, the head
size rounded up to a power of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backend
from ..backend import triton


class Config(NamedTuple):
    """How one kernel is launched: BLOCK_M rows of queries against BLOCK_N keys, of ``heads`` heads (short route).

    maxnreg: registers a thread may have. Left alone (None) the assembler may spill some to make room for a block more.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    heads: int = 1
    maxnreg: int | None = None


class Table(NamedTuple):
    """The configurations of one architecture and element size, by BLOCK_D.

    short_forward, short_backward: the longest segment that fits one tile, 0 for none.
    """

    short_forward: dict[int, int]
    short_backward: dict[int, int]
    long_forward: dict[int, Config]
    long_backward_dq: dict[int, Config]
    long_backward_dk_dv: dict[int, Config]


FULL_TILE = 64  # rows: what Hopper's matrix instruction wants, and four warps' worth of Ampere's

# (architecture, bytes of an element); an architecture not listed takes the newest one listed below it.
TABLES = {
    (80, 2): Table(
        short_forward={16: 128, 32: 128, 64: 128, 128: 64, 256: 0},
        short_backward={16: 128, 32: 128, 64: 128, 128: 64, 256: 32},
        long_forward={
            16: Config(128, 128, 8, 2),
            32: Config(128, 128, 8, 2),
            64: Config(128, 64, 8, 3),
            128: Config(32, 32, 4, 2),
            256: Config(32, 16, 8, 1),
        },
        long_backward_dq={
            16: Config(128, 64, 8, 2),
            32: Config(128, 64, 8, 2),
            64: Config(64, 32, 4, 2),
            128: Config(32, 32, 8, 2),
            256: Config(16, 16, 8, 1),
        },
        long_backward_dk_dv={
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(16, 64, 8, 2),
            128: Config(16, 16, 4, 1),
            256: Config(16, 32, 8, 1),
        },
    ),
    (90, 2): Table(
        short_forward={16: 128, 32: 128, 64: 128, 128: 128, 256: 128},
        short_backward={16: 128, 32: 128, 64: 128, 128: 128, 256: 32},
        long_forward={
            16: Config(128, 128, 8, 2),
            32: Config(128, 128, 8, 2),
            64: Config(128, 128, 8, 2),
            128: Config(128, 64, 8, 3),
            256: Config(64, 32, 8, 1),
        },
        long_backward_dq={
            16: Config(128, 64, 8, 2),
            32: Config(128, 64, 8, 2),
            64: Config(128, 64, 8, 2),
            128: Config(128, 64, 8, 2),
            256: Config(64, 32, 8, 2),
        },
        long_backward_dk_dv={
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(64, 128, 8, 2),
            128: Config(32, 128, 8, 2),
            256: Config(16, 64, 8, 2),
        },
    ),
    # float32 products run on the plain cores, unrolled: small tiles.
    (80, 4): Table(
        short_forward={16: 64, 32: 32, 64: 32, 128: 16, 256: 16},
        short_backward={16: 64, 32: 32, 64: 32, 128: 16, 256: 16},
        long_forward={
            16: Config(32, 32, 4, 2),
            32: Config(32, 32, 8, 1),
            64: Config(32, 32, 8, 1, maxnreg=128),
            128: Config(32, 16, 8, 1),
            256: Config(16, 16, 8, 1),
        },
        long_backward_dq={
            16: Config(32, 16, 4, 2, maxnreg=255),
            32: Config(16, 32, 4, 2),
            64: Config(32, 16, 4, 1),
            128: Config(32, 16, 8, 1),
            256: Config(16, 16, 8, 1),
        },
        long_backward_dk_dv={
            16: Config(32, 32, 4, 2),
            32: Config(16, 32, 4, 2, maxnreg=255),
            64: Config(32, 16, 8, 1, maxnreg=255),
            128: Config(16, 16, 8, 1),
            256: Config(16, 16, 8, 1),
        },
    ),
}

# Blackwell: Hopper's, but for fewer stages in two places.
_hopper = TABLES[90, 2]
TABLES[100, 2] = _hopper._replace(
    long_backward_dq=_hopper.long_backward_dq | {256: Config(64, 32, 8, 1)},
    long_backward_dk_dv=_hopper.long_backward_dk_dv | {128: Config(32, 128, 8, 1)},
)

# From 64 rows on Triton (3.7.1) multiplies float32 in TF32 on sm_100, whatever precision is asked for: smaller tiles.
TABLES[100, 4] = TABLES[80, 4]._replace(
    short_forward={16: 32, 32: 32, 64: 32, 128: 16, 256: 16},
    short_backward={16: 32, 32: 32, 64: 32, 128: 16, 256: 16},
)

NOTHING = Table({}, {}, {}, {}, {})

# What differs under a padding mask, a window or grouped heads, which take more registers: entries that then spill.
MASKED: dict[tuple[int, int], Table] = {
    (80, 2): NOTHING._replace(
        short_forward={128: 32},
        long_forward={32: Config(128, 64, 8, 3), 128: Config(32, 32, 4, 2, maxnreg=168)},
        long_backward_dq={128: Config(32, 16, 4, 2)},
    ),
    (90, 2): NOTHING._replace(long_backward_dk_dv={256: Config(16, 32, 8, 2)}),
    (100, 2): NOTHING._replace(
        long_forward={16: Config(128, 64, 8, 3), 32: Config(128, 64, 8, 3), 64: Config(128, 64, 8, 3)},
        long_backward_dk_dv={128: Config(32, 128, 8, 1, maxnreg=255)},
    ),
}


def block(n: int) -> int:
    """The tile that holds n rows or columns: a power of two, at least 16 for the matrix instructions."""
    return max(16, triton.next_power_of_2(n))


def _known(dtype: torch.dtype) -> tuple[int, int]:
    listed = sorted(arch for arch, size in TABLES if size == dtype.itemsize)
    return max((arch for arch in listed if arch <= backend.architecture()), default=listed[0]), dtype.itemsize


def table(dtype: torch.dtype, masked: bool = False) -> Table:
    """The table for ``dtype`` on this machine's GPU. masked: under a padding mask, a window or grouped heads."""
    known = _known(dtype)
    plain, own = TABLES[known], MASKED.get(known, NOTHING)
    if not masked:
        return plain
    return Table(*({**getattr(plain, name), **getattr(own, name)} for name in Table._fields))


def _short(longest: int, num_heads: int, max_q: int, max_k: int, dtype: torch.dtype) -> Config | None:
    rows = max(max_q, max_k)
    if rows > longest:
        return None
    block_m, block_n, heads = block(max_q), block(max_k), 1
    # float32 has no matrix instruction to fill. num_heads: what a tile may gather.
    full = min(FULL_TILE, longest) if dtype.itemsize == 2 else 0
    while 2 * max(block_m, block_n) <= full and num_heads % (2 * heads) == 0:
        block_m, block_n, heads = 2 * block_m, 2 * block_n, 2 * heads
    return Config(block_m, block_n, 8 if max(block_m, block_n) > 64 else 4, 1, heads)


def short_forward(
    head_dim: int, num_heads: int, max_q: int, max_k: int, groups: int, dtype: torch.dtype, masked: bool
) -> Config | None:
    """None where the longest segment does not fit one tile."""
    longest = table(dtype, masked).short_forward[block(head_dim)]
    return _short(longest, num_heads if groups == 1 else 1, max_q, max_k, dtype)


def short_backward(
    head_dim: int, num_heads: int, max_q: int, max_k: int, groups: int, dtype: torch.dtype, masked: bool
) -> Config | None:
    """None where the longest segment does not fit one tile, or heads share their keys."""
    if groups > 1:
        return None
    return _short(table(dtype, masked).short_backward[block(head_dim)], num_heads, max_q, max_k, dtype)


def long_forward(head_dim: int, dtype: torch.dtype, masked: bool) -> Config:
    return table(dtype, masked).long_forward[block(head_dim)]


def long_backward_dq(head_dim: int, dtype: torch.dtype, masked: bool) -> Config:
    return table(dtype, masked).long_backward_dq[block(head_dim)]


def long_backward_dk_dv(head_dim: int, dtype: torch.dtype, masked: bool) -> Config:
    return table(dtype, masked).long_backward_dk_dv[block(head_dim)]
