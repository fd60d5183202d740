"""Dropout of attention weights: which draw of Philox belongs to which weight, in Triton and in PyTorch.

    weight (query i, key j)   draw 4 i₃ + 2 j₃ + j₀ of counter (j // 16 · 4 + j % 8 // 2, i // 16 · 8 + i % 8, plane, 0)

where x_b is bit b of x and plane = segment · heads + head. The layout follows the matrix instructions, so that no draw
moves between threads: README.md, "Dropout".
"""

from __future__ import annotations

import math

import torch

from ..backend import tl, triton
from ..dropout import draws_kept, halves, philox, philox_words


@triton.jit
def keep_tile(seed, p_threshold, start_m, start_n, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] booleans: which weights of queries start_m, … and keys start_n, … are kept.

    start_m, start_n: multiples of 16.
    """
    # Number the calls so that a warp holds four pairs of columns by eight rows, as the matrix instructions do.
    call = tl.arange(0, BLOCK_M * BLOCK_N // 8)  # [calls]
    columns = start_n // 4 + call // (2 * BLOCK_M) * 4 + call % 4  # [calls]
    rows = call % (2 * BLOCK_M) // 4  # [calls]
    a, b, c, d = philox(seed, columns, start_m // 2 + rows, call * 0 + plane)  # [calls]
    draws = halves(tl.join(tl.join(a, c), tl.join(b, d)))  # [calls, i₃, j₃, j₀]
    draws = tl.reshape(draws, (BLOCK_N // 16, BLOCK_M // 16, 8, 4, 2, 2, 2))  # [n, m, i₂₁₀, j₂₁, i₃, j₃, j₀]
    draws = tl.permute(draws, (1, 4, 2, 0, 5, 3, 6))  # [m, i₃, i₂₁₀, n, j₃, j₂₁, j₀]
    return tl.reshape(draws, (BLOCK_M, BLOCK_N)) >= p_threshold


@triton.jit
def keep_tile_transposed(seed, p_threshold, start_m, start_n, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`keep_tile` transposed: [BLOCK_N, BLOCK_M]. A thread holds pairs of adjacent queries: twice the calls."""
    call = tl.arange(0, BLOCK_M * BLOCK_N // 4)  # [calls]
    keys = call % (2 * BLOCK_N) // 4  # [calls], without j₃
    queries = call // (4 * BLOCK_N) * 8 + call % 4 * 2 + call // (2 * BLOCK_N) % 2  # [calls], without i₃
    columns = start_n // 4 + keys // 8 * 4 + keys % 8 // 2  # [calls]
    a, b, c, d = philox(seed, columns, start_m // 2 + queries, call * 0 + plane)  # [calls]
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [calls, i₃, j₃]
    draws = words << (16 - 16 * (keys % 2)).to(tl.uint32)[:, None, None]  # [calls, i₃, j₃]
    draws = tl.reshape(draws, (BLOCK_M // 16, 2, BLOCK_N // 16, 8, 4, 2, 2))  # [m, i₀, n, j₂₁₀, i₂₁, i₃, j₃]
    draws = tl.permute(draws, (2, 6, 3, 0, 5, 4, 1))  # [n, j₃, j₂₁₀, m, i₃, i₂₁, i₀]
    return tl.reshape(draws, (BLOCK_N, BLOCK_M)) >= p_threshold


def attention_dropout_mask(
    p: float, seed: int | torch.Tensor, n_q: int, n_k: int, planes: int = 1, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The attention weights that (p, seed) keeps: bool [planes, n_q, n_k], True where a weight is kept.

    For inspection and tests: it uses some hundreds of bytes per weight while it computes.

    Args:
        p: probability of dropping a weight, in [0, 1). The operators scale kept weights by 1 / (1 − p).
        seed: int, or int64 tensor of one element.
        n_q, n_k: queries and keys of the longest segment; a shorter segment uses the mask's first rows and columns.
        planes: segments · heads. Plane s · heads + h is head h of segment s.
        device: of the result.
    """
    m, n = math.ceil(n_q / 16), math.ceil(n_k / 16)
    plane, rows, columns = (torch.arange(length, device=device) for length in (planes, 8 * m, 4 * n))
    words = philox_words(seed, columns, rows[:, None], plane[:, None, None])  # [planes, 8 m, 4 n, 4]
    kept = draws_kept(words, p).reshape(planes, m, 8, n, 4, 2, 2, 2)  # [planes, m, i₂₁₀, n, j₂₁, i₃, j₃, j₀]
    return kept.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(planes, 16 * m, 16 * n)[:, :n_q, :n_k]
