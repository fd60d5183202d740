"""Dropout without a stored mask: every element's fate is a pure function of (seed, position).

Element (row i, column j) of plane k is kept when

    Philox4x32-10(key = seed, counter = (j // 4, i, k, 0))[j % 4]  ≥  round(p · 2³²)

(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so the backward draws the forward's mask
again, four columns share one Philox call, and a seed names the same mask on every GPU, grid and tile size.
Attention uses i = query, j = key, k = segment · heads + head; dropout+add+layernorm uses i = row, j = column, k = 0.
``dropout_mask`` materialises the mask in plain PyTorch, to check kernels exactly and to see what was dropped.
"""

from __future__ import annotations

import math

import torch

from ._triton import tl, triton


@triton.jit
def dropout_keep(seed, p_threshold, rows, first_column, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] booleans: which elements of a tile survive.

    rows: [BLOCK_M] int32 row numbers; first_column: a multiple of 4; p_threshold: uint32, p · 2³².
    """
    groups = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 4), dtype=tl.int32)
    a, b, c, d = tl.philox(seed, zeros + groups[None, :], zeros + rows[:, None], zeros + plane, zeros)
    # join adds a last axis of 2; joined twice and flattened the order is a, b, c, d: column 4g + r is word r.
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_M, BLOCK_N))
    return words >= p_threshold


def keep_threshold(p: float) -> int:
    """The uint32 a random word must reach to be kept.

    Raises:
        ValueError: ``p`` is not in [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"the dropout probability must be in [0, 1); got {p}")
    return round(p * 2**32)


def resolve_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The int64 tensor of one element on ``device`` from which the kernels read the seed.

    ``None`` draws one from torch's generator on that device: ``torch.manual_seed`` governs it, nothing synchronises,
    and a captured CUDA graph draws a new one at each replay.

    Raises:
        TypeError: a tensor seed is not int64, or not an int, tensor or None.
        ValueError: a tensor seed has more than one element or lies on another device, or an int exceeds 64 bits.
    """
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor; got {seed.dtype}")
        if seed.numel() != 1 or seed.device != device:
            raise ValueError(f"seed must be one element on {device}; got shape {tuple(seed.shape)} on {seed.device}")
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, an int64 tensor or None; got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, signed; got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


_MASK32 = 0xFFFFFFFF


def _multiply_32(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 64-bit product of two uint32 held in int64 (split, so that nothing overflows)."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    high = high + (low >> 16)
    return (high >> 16) & _MASK32, ((high << 16) | (low & 0xFFFF)) & _MASK32


def _philox(seed: int | torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 words as int64, a last axis of 4; counter (c0, c1, c2, 0), broadcast."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high_a, low_a = _multiply_32(0xD2511F53, c0)
        high_b, low_b = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def dropout_mask(
    p: float, seed: int | torch.Tensor, rows: int, columns: int, planes: int = 1, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The mask the kernels draw for (p, seed): bool [planes, rows, columns], True where an element is kept.

    Kept elements are scaled by 1 / (1 − p) in the operators; the mask itself is not scaled. For inspection and
    tests: it takes some hundreds of bytes an element while it works.
    """
    threshold = keep_threshold(p)
    if isinstance(seed, torch.Tensor):
        seed = seed.reshape(())  # stays a tensor: reading it would wait for the device, and break a compiled graph
    groups = math.ceil(columns / 4)
    index = torch.arange(max(groups, rows, planes), dtype=torch.int64, device=device)
    words = _philox(seed, index[None, None, :groups], index[None, :rows, None], index[:planes, None, None])
    return (words >= threshold).reshape(planes, rows, 4 * groups)[..., :columns]


__all__ = ["dropout_keep", "dropout_mask", "keep_threshold", "resolve_seed"]
