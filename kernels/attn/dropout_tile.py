"""Attention's dropout: which weights of a tile survive, drawn where the tile's threads need them.

Of every 16 × 16 scores a thread of the matrix instructions (Ampere's mma and Hopper's wgmma alike) holds two rows 8
apart, and in each two pairs of adjacent columns 8 apart: eight elements. These share a call of `dropout.philox`, so
that no draw has to move from one thread to another, which would cost as much as drawing:

    weight (query i, key j)    draw 4 i₃ + 2 j₃ + j₀ of counter (j // 16 · 4 + j % 8 // 2, i // 16 · 8 + i % 8, k, 0)

with x_b bit b of x and k = segment · heads + head. In a transposed tile, which dK and dV use, a thread holds pairs of
adjacent queries instead: it makes twice the calls and uses half of each word.

Instructions of a thread as compiled for sm_90 (bench/results/*-aot-sm_90.json), D = 64, bf16: without dropout, with it,
and what it added before, as a word of Philox4x32-10 a weight, drawn where the compiler likes. 64 weights a thread, in
dK and dV 32, twice: the loop's body and the peeled tile.

    short forward     1136    1704    (1480)
    short backward    1656    2176    (1488)
    long dQ           1488    1976    (1496)
    long dK, dV       1832    2736    (880, of 16 weights)
"""

from __future__ import annotations

import math

import torch

from ..backend import tl, triton
from ..dropout import draws_kept, halves, philox, philox_words


@triton.jit
def keep_tile(
    seed, p_threshold, start_m, start_n, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr = 1
):
    """[BLOCK_M, BLOCK_N] booleans: the weights of queries start_m … and keys start_n …, multiples of 16, that survive.

    HEADS: `attention_tiles.tile_rows`: the rows are of planes plane, plane + 1, …
    """
    # The calls in the order of the threads that hold their weights: four pairs of columns by eight rows are a warp's.
    call = tl.arange(0, BLOCK_M * BLOCK_N // 8)
    columns = start_n // 4 + call // (2 * BLOCK_M) * 4 + call % 4
    rows = call % (2 * BLOCK_M) // 4
    of_head: tl.constexpr = BLOCK_M // 2 // HEADS
    a, b, c, d = philox(seed, columns, start_m // 2 + rows % of_head, plane + rows // of_head)
    draws = halves(tl.join(tl.join(a, c), tl.join(b, d)))  # [.., i₃, j₃, j₀]
    draws = tl.reshape(draws, (BLOCK_N // 16, BLOCK_M // 16, 8, 4, 2, 2, 2))
    draws = tl.permute(draws, (1, 4, 2, 0, 5, 3, 6))
    return tl.reshape(draws, (BLOCK_M, BLOCK_N)) >= p_threshold


@triton.jit
def keep_tile_transposed(seed, p_threshold, start_m, start_n, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`keep_tile`, as [BLOCK_N, BLOCK_M]."""
    call = tl.arange(0, BLOCK_M * BLOCK_N // 4)
    keys = call % (2 * BLOCK_N) // 4  # without j₃
    queries = call // (4 * BLOCK_N) * 8 + call % 4 * 2 + call // (2 * BLOCK_N) % 2  # without i₃
    columns = start_n // 4 + keys // 8 * 4 + keys % 8 // 2
    a, b, c, d = philox(seed, columns, start_m // 2 + queries, call * 0 + plane)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [.., i₃, j₃]
    draws = words << (16 - 16 * (keys % 2)).to(tl.uint32)[:, None, None]
    draws = tl.reshape(draws, (BLOCK_M // 16, 2, BLOCK_N // 16, 8, 4, 2, 2))
    draws = tl.permute(draws, (2, 6, 3, 0, 5, 4, 1))
    return tl.reshape(draws, (BLOCK_N, BLOCK_M)) >= p_threshold


def attention_dropout_mask(
    p: float, seed: int | torch.Tensor, n_q: int, n_k: int, planes: int = 1, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """What attention keeps for (p, seed): bool [planes, n_q, n_k], True where a weight is kept; planes as above.

    Kept weights are scaled by 1 / (1 − p) in the operator; the mask itself is not scaled. For inspection and tests: it
    takes some hundreds of bytes a weight while it works.
    """
    m, n = math.ceil(n_q / 16), math.ceil(n_k / 16)
    plane, rows, columns = (torch.arange(length, device=device) for length in (planes, 8 * m, 4 * n))
    words = philox_words(seed, columns, rows[:, None], plane[:, None, None])
    kept = draws_kept(words, p).reshape(planes, m, 8, n, 4, 2, 2, 2)  # (.., i₃, j₃, j₀)
    return kept.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(planes, 16 * m, 16 * n)[:, :n_q, :n_k]


__all__ = ["attention_dropout_mask", "keep_tile", "keep_tile_transposed"]
