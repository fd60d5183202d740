"""Dropout without a stored mask: every element's fate is a pure function of (seed, position).

Random words come from Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; seven
rounds are the fewest that they find to pass BigCrush), keyed by the seed, so the backward draws the forward's mask
again, and a seed names the same mask on every GPU, grid and tile size. Drawing is what dropout costs, so a word is two
draws of 16 bits, eight a call: draw r is word r // 2, its low half where r is even. An element is kept when its draw
reaches round(p · 2¹⁶): p is met to within 2⁻¹⁷.

Which elements share a call depends on which a thread holds. Operators that work row by row: eight adjacent columns,

    element (row i, column j)    draw j mod 8 of counter (j // 8, i, 0, 0)

and `attention_dropout` for attention's tiles. ``dropout_mask`` materialises the mask in plain PyTorch, to check
kernels exactly and to see what was dropped.
"""

from __future__ import annotations

import math

import torch

from .backend import tl, triton
from .checks import check_probability, check_seed

ROUNDS = tl.constexpr(7)


@triton.jit
def philox(seed, c0, c1, c2):
    """The four uint32 words of counter (c0, c1, c2, 0), elementwise over int32 tensors of one shape."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32)
    c3 = c0 * 0
    for _ in tl.static_range(ROUNDS):
        # 64-bit products: one instruction gives both halves.
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def halves(words):
    """The two draws of each word, in its upper half and joined as a last axis; what is below them does not matter."""
    return tl.join(words << 16, words)


@triton.jit
def dropout_keep(seed, p_threshold, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, first_column=0):
    """[BLOCK_M, BLOCK_N] booleans: which elements of rows, from first_column on, survive.

    rows: [BLOCK_M] int32 row numbers; p_threshold: `keep_threshold`; BLOCK_N and first_column: multiples of 8.
    """
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 8), dtype=tl.int32)
    groups = first_column // 8 + tl.arange(0, BLOCK_N // 8)
    a, b, c, d = philox(seed, zeros + groups[None, :], zeros + rows[:, None], zeros)
    # join adds a last axis of 2: joined twice and flattened the order is a, b, c, d.
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(halves(words), (BLOCK_M, BLOCK_N)) >= p_threshold


def keep_threshold(p: float) -> int:
    """The uint32 that a draw, in the upper half of a word, must reach to be kept.

    Raises:
        ValueError: ``p`` is not in [0, 1).
    """
    check_probability("p", p)
    return min(round(p * 2**16), 2**16 - 1) << 16


def resolve_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The int64 tensor of one element on ``device`` from which the kernels read the seed.

    ``None`` draws one from torch's generator on that device: ``torch.manual_seed`` governs it, nothing synchronises,
    and a captured CUDA graph draws a new one at each replay.

    Raises:
        TypeError: a tensor seed is not int64, or not an int, tensor or None.
        ValueError: a tensor seed has more than one element or lies on another device, or an int exceeds 64 bits.
    """
    check_seed(seed, device)
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)


_MASK32 = 0xFFFFFFFF


def _multiply_32(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 64-bit product of two uint32 held in int64 (split, so that nothing overflows)."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    high = high + (low >> 16)
    return (high >> 16) & _MASK32, ((high << 16) | (low & 0xFFFF)) & _MASK32


def philox_words(seed: int | torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> torch.Tensor:
    """`philox` in PyTorch: words as int64, a last axis of 4; counter (c0, c1, c2, 0), broadcast."""
    if isinstance(seed, torch.Tensor):
        seed = seed.reshape(())  # stays a tensor: reading it would wait for the device, and break a compiled graph
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS.value):
        high_a, low_a = _multiply_32(0xD2511F53, c0)
        high_b, low_b = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def draws_kept(words: torch.Tensor, p: float) -> torch.Tensor:
    """bool, a last axis of 2 more than ``words``: which of their draws are kept."""
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1) >= keep_threshold(p) >> 16


def dropout_mask(
    p: float, seed: int | torch.Tensor, rows: int, columns: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """What the row by row operators keep for (p, seed): bool [rows, columns], True where an element is kept.

    Kept elements are scaled by 1 / (1 − p) in the operators; the mask itself is not scaled. For inspection and
    tests: it takes some hundreds of bytes an element while it works. `attention_dropout_mask` is attention's.
    """
    groups = torch.arange(math.ceil(columns / 8), device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox_words(seed, groups[None, :], torch.arange(rows, device=device)[:, None], zero)
    return draws_kept(words, p).reshape(rows, 8 * groups.numel())[:, :columns]


__all__ = [
    "draws_kept",
    "dropout_keep",
    "dropout_mask",
    "halves",
    "keep_threshold",
    "philox",
    "philox_words",
    "resolve_seed",
]
