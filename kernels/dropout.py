"""Dropout without a stored mask: whether an element is kept is a function of (seed, position).

Random words come from Philox4x32-7, keyed by the seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011; seven rounds are the fewest they found to pass BigCrush). The backward draws the forward's mask again, and a
seed gives the same mask on every GPU, grid and tile size.

Random words are the cost of dropout, so each 32-bit word makes two draws of 16 bits: a Philox call makes eight. Draw r
is word r // 2, its low half where r is even. An element is kept when its draw is at least round(p · 2¹⁶), so p is exact
to 2⁻¹⁷. The elements of one call should lie in one thread. In operators that work row by row they are eight columns:

    element (row i, column j)    draw j mod 8 of counter (j // 8, i, 0, 0)

attn/dropout_tile.py has the layout for attention's tiles. `dropout_mask` computes the mask in plain PyTorch.
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
    """The two draws of each word, as a new last axis. Each is in the upper 16 bits; the lower bits are arbitrary."""
    return tl.join(words << 16, words)


@triton.jit
def dropout_keep(seed, p_threshold, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, first_column=0):
    """[BLOCK_M, BLOCK_N] booleans: whether each element is kept, in columns from first_column on.

    rows: [BLOCK_M] int32 row numbers; p_threshold: `keep_threshold`; BLOCK_N and first_column: multiples of 8.
    """
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 8), dtype=tl.int32)
    groups = first_column // 8 + tl.arange(0, BLOCK_N // 8)  # [BLOCK_N / 8]
    a, b, c, d = philox(seed, zeros + groups[None, :], zeros + rows[:, None], zeros)  # [BLOCK_M, BLOCK_N / 8] each
    # join adds a last axis of 2. Joined twice and flattened, the order is a, b, c, d.
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK_M, BLOCK_N / 8, 2, 2]
    return tl.reshape(halves(words), (BLOCK_M, BLOCK_N)) >= p_threshold


def keep_threshold(p: float) -> int:
    """The smallest draw, a uint32 with the 16 bits in its upper half, that keeps an element.

    Raises:
        ValueError: ``p`` is not in [0, 1).
    """
    check_probability("p", p)
    return min(round(p * 2**16), 2**16 - 1) << 16


def resolve_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor of one element on ``device``, where the kernels read it.

    ``None`` draws a seed from torch's generator on that device, which ``torch.manual_seed`` controls. That does not
    synchronise, and a captured CUDA graph draws a new seed at each replay.

    Raises:
        TypeError: the seed is not an int, an int64 tensor or None.
        ValueError: a tensor seed has more than one element or is on another device, or an int exceeds 64 bits.
    """
    check_seed(seed, device)
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)


_MASK32 = 0xFFFFFFFF


def _multiply_32(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the product of two uint32 held in int64, in halves so that int64 does not overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    high = high + (low >> 16)
    return (high >> 16) & _MASK32, ((high << 16) | (low & 0xFFFF)) & _MASK32


def philox_words(seed: int | torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> torch.Tensor:
    """`philox` in PyTorch: int64 words, a new last axis of 4, for counters (c0, c1, c2, 0), broadcast."""
    if isinstance(seed, torch.Tensor):
        seed = seed.reshape(())  # stays a tensor: reading it would synchronise, and break a compiled graph
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
    """bool [*words.shape, 2]: whether each word's two draws keep their element."""
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1) >= keep_threshold(p) >> 16


def dropout_mask(
    p: float, seed: int | torch.Tensor, rows: int, columns: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The mask of the operators that work row by row: bool [rows, columns], True where an element is kept.

    The operators scale kept elements by 1 / (1 − p); the mask is not scaled. For inspection and tests: it needs some
    hundreds of bytes an element while it runs. `attention_dropout_mask` gives attention's masks.
    """
    groups = torch.arange(math.ceil(columns / 8), device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox_words(seed, groups[None, :], torch.arange(rows, device=device)[:, None], zero)
    return draws_kept(words, p).reshape(rows, 8 * groups.numel())[:, :columns]
