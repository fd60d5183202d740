"""Tile sizes, warps and pipeline stages of attention's kernels, by shape and architecture.

An entry is the largest tile that compiles without register spills and fits the shared memory, with and without dropout.
`fusebert bench tune` derives the tables; tests/bench/compiled/test_aot_attention.py compiles every entry. No entry has
been chosen by timing yet. Keys are BLOCK_D, the head size rounded up to a power of two.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .. import backend
from ..backend import triton


class Config(NamedTuple):
    """How one kernel is launched.

    block_m, block_n: queries and keys of a tile.
    maxnreg: limit of registers per thread. With None the assembler may spill to fit one more block per multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


class Table(NamedTuple):
    """The configurations of one architecture and element size: BLOCK_D -> configuration.

    short_forward, short_backward: BLOCK_D -> rows of the longest segment that fits one tile, 0 for none.
    """

    short_forward: dict[int, int]
    short_backward: dict[int, int]
    long_forward: dict[int, Config]
    long_backward_dq: dict[int, Config]
    long_backward_dk_dv: dict[int, Config]


ShortKernel = Literal["short_forward", "short_backward"]
LongKernel = Literal["long_forward", "long_backward_dq", "long_backward_dk_dv"]

TABLES_OF = (3, 7)  # the Triton that the entries of TABLES and MASKED are for

# (architecture, bytes of an element) -> table. Other architectures take the newest listed one below them.
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
    # float32 products are unrolled scalar multiply-adds: small tiles.
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

# Blackwell: Hopper's entries with fewer stages in two places, and a limit where the assembler would spill.
_hopper = TABLES[90, 2]
TABLES[100, 2] = _hopper._replace(
    long_backward_dq=_hopper.long_backward_dq | {64: Config(128, 64, 8, 2, maxnreg=255), 256: Config(64, 32, 8, 1)},
    long_backward_dk_dv=_hopper.long_backward_dk_dv | {128: Config(32, 128, 8, 1)},
)

# With 64 rows or more, Triton 3.7.1 multiplies float32 in TF32 on sm_100 at any input precision: smaller tiles.
TABLES[100, 4] = TABLES[80, 4]._replace(
    short_forward={16: 32, 32: 32, 64: 32, 128: 16, 256: 16},
    short_backward={16: 32, 32: 32, 64: 32, 128: 16, 256: 16},
)

# sm_120 (GeForce, RTX PRO) has Ampere's matrix instructions and less shared memory, and spills more: fewer rows, or a
# limit where the assembler would spill to fit one more block. In float32 at D = 256 grouped heads spill 8 bytes in dQ.
TABLES[120, 2] = TABLES[80, 2]._replace(short_backward=TABLES[80, 2].short_backward | {128: 32})
_ampere = TABLES[80, 4]
TABLES[120, 4] = _ampere._replace(
    long_forward=_ampere.long_forward | {256: Config(16, 16, 8, 1, maxnreg=255)},
    long_backward_dq=_ampere.long_backward_dq | {128: Config(16, 16, 4, 1)},
    long_backward_dk_dv=_ampere.long_backward_dk_dv | {16: Config(32, 32, 4, 2, maxnreg=255)},
)

NO_ENTRIES = Table({}, {}, {}, {}, {})

# Replacements under a padding mask, a window or grouped heads: these take more registers, and some entries would spill.
_masked_ampere = NO_ENTRIES._replace(
    short_forward={128: 32},
    long_forward={32: Config(128, 64, 8, 3), 128: Config(32, 32, 4, 2, maxnreg=168)},
    long_backward_dq={128: Config(32, 16, 4, 2)},
)
MASKED: dict[tuple[int, int], Table] = {
    (80, 2): _masked_ampere,
    (120, 2): _masked_ampere,
    (90, 2): NO_ENTRIES._replace(long_backward_dk_dv={256: Config(16, 32, 8, 2)}),
    (100, 2): NO_ENTRIES._replace(
        long_forward={16: Config(128, 64, 8, 3), 32: Config(128, 64, 8, 3), 64: Config(128, 64, 8, 3)},
        long_backward_dk_dv={128: Config(32, 128, 8, 1, maxnreg=255)},
    ),
}

# Replacements, under a mask too, for versions of Triton with which entries above would spill: (major, minor) -> tables.
_ampere_since_3_8 = NO_ENTRIES._replace(
    short_forward={128: 32},
    short_backward={64: 64, 128: 32},
    long_backward_dq={64: Config(64, 32, 4, 2, maxnreg=255)},
    long_backward_dk_dv={32: Config(32, 128, 8, 2)},
)
BY_TRITON: dict[tuple[int, int], dict[tuple[int, int], Table]] = {
    (3, 6): {(arch, 2): NO_ENTRIES._replace(short_forward={128: 32}) for arch in (80, 120)},
    (3, 8): {
        (80, 2): _ampere_since_3_8,
        (120, 2): _ampere_since_3_8,
        (90, 2): NO_ENTRIES._replace(
            short_backward={128: 64},
            long_backward_dk_dv={64: Config(64, 128, 8, 1), 128: Config(16, 128, 8, 2)},
        ),
        (100, 2): NO_ENTRIES._replace(
            short_backward={128: 64},
            long_backward_dk_dv={d: Config(64, 128, 8, 1) for d in (16, 32, 64)},
        ),
    },
    (3, 9): {
        (80, 2): _ampere_since_3_8,
        (120, 2): _ampere_since_3_8,
        (90, 2): NO_ENTRIES._replace(
            long_backward_dk_dv={64: Config(64, 128, 8, 1), 128: Config(32, 128, 8, 1)},
        ),
        (100, 2): NO_ENTRIES._replace(
            short_forward={64: 64},
            short_backward={128: 64},
            long_backward_dk_dv={d: Config(64, 128, 8, 1) for d in (32, 64)},
        ),
    },
}


def block(n: int) -> int:
    """The tile that holds n rows or columns: a power of two, at least 16 for the matrix instructions."""
    return max(16, triton.next_power_of_2(n))


def table_key(dtype: torch.dtype) -> tuple[int, int]:
    """The key in TABLES for this machine's GPU."""
    listed = sorted(arch for arch, size in TABLES if size == dtype.itemsize)
    return max((arch for arch in listed if arch <= backend.architecture()), default=listed[0]), dtype.itemsize


def table(dtype: torch.dtype, masked: bool = False) -> Table:
    """The table for ``dtype`` on this machine's GPU. masked: under a padding mask, a window or grouped heads."""
    key = table_key(dtype)
    plain, replaced = TABLES[key], BY_TRITON.get(backend.triton_version(), {}).get(key)
    changes = [MASKED.get(key)] * masked + [replaced]
    for change in filter(None, changes):
        plain = Table(*({**getattr(plain, name), **getattr(change, name)} for name in Table._fields))
    return plain


def short_config(
    kernel: ShortKernel,
    head_dim: int,
    max_q: int,
    max_k: int,
    groups: int,
    dtype: torch.dtype,
    masked: bool,
) -> Config | None:
    """The short route's configuration. None: take the long route.

    Args:
        max_q, max_k: rows of the longest segment.
        groups: query heads per key head. The short backward supports only 1.
        masked: under a padding mask, a window or grouped heads.
    """
    if kernel == "short_backward" and groups > 1:
        return None
    longest = getattr(table(dtype, masked), kernel)[block(head_dim)]
    if max(max_q, max_k) > longest:
        return None
    block_m, block_n = block(max_q), block(max_k)
    return Config(block_m, block_n, _short_warps(max(block_m, block_n), head_dim, dtype), 1)


def _short_warps(rows: int, head_dim: int, dtype: torch.dtype) -> int:
    if rows > 64:
        return 8
    # A matrix instruction takes 16 rows: with more warps than rows / 16 they compute the same.
    return 1 if rows <= 32 and head_dim <= 64 and dtype.itemsize == 2 else 4


def long_config(kernel: LongKernel, head_dim: int, dtype: torch.dtype, masked: bool) -> Config:
    """The long route's configuration. masked: under a padding mask, a window or grouped heads."""
    config: Config = getattr(table(dtype, masked), kernel)[block(head_dim)]
    return config
