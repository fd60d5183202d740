"""Tile sizes, warps and pipeline stages of attention's kernels, by shape and architecture."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._triton import triton

SHORT_MAX = 128  # keys; a larger whole tile of scores does not fit the registers


class Config(NamedTuple):
    """How one kernel is launched; BLOCK_M rows of queries against BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _block(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def short_forward(head_dim: int, max_q: int, max_k: int, dtype: torch.dtype) -> Config | None:
    """None where a segment does not fit in one tile."""
    if max(max_q, max_k) > SHORT_MAX:
        return None
    block_m, block_n = _block(max_q), _block(max_k)
    return Config(block_m, block_n, 8 if block_m * block_n >= 128 * 128 else 4, 1)


def short_backward(head_dim: int, max_k: int, dtype: torch.dtype) -> Config | None:
    """None where a segment's keys do not fit in one tile."""
    if max_k > SHORT_MAX:
        return None
    block_n = _block(max_k)
    return Config(min(block_n, 64), block_n, 8 if block_n >= 128 else 4, 1)


def long_forward(head_dim: int, dtype: torch.dtype) -> Config:
    return Config(128, 64, 4, 3)


def long_backward_dq(head_dim: int, dtype: torch.dtype) -> Config:
    return Config(128, 64, 8, 2)


def long_backward_dk_dv(head_dim: int, dtype: torch.dtype) -> Config:
    return Config(64, 128, 8, 2)
