"""Normalisation of rows held in registers, forward and backward: the core of norm/ and embedding/.

norm/README.md has the equations.
"""

from __future__ import annotations

from .backend import tl, triton
from .rows import Config

# The forward holds a row in the registers of one program. Wider rows run the reference.
MAX_HIDDEN_SIZE = 16384


@triton.jit
def normalise_forward(s, mask, eps, H: tl.constexpr, CENTRED: tl.constexpr = True):
    """(x̂ [BLOCK_M, BLOCK_H], mean [BLOCK_M], rstd [BLOCK_M]) of rows s; without CENTRED (RMSNorm) the mean is 0."""
    if not CENTRED:
        rstd = tl.rsqrt(tl.sum(s * s, axis=1) / H + eps)  # [BLOCK_M]
        return s * rstd[:, None], rstd * 0.0, rstd
    mean = tl.sum(s, axis=1) / H  # [BLOCK_M]
    # Corrected two-pass variance (Chan, Golub, LeVeque 1983): ⟨s²⟩ − μ² would cancel where μ is large.
    d = tl.where(mask, s - mean[:, None], 0.0)  # [BLOCK_M, BLOCK_H]
    mean_d = tl.sum(d, axis=1) / H  # [BLOCK_M]
    variance = tl.maximum(tl.sum(d * d, axis=1) / H - mean_d * mean_d, 0.0)  # [BLOCK_M]
    rstd = tl.rsqrt(variance + eps)  # [BLOCK_M]
    return (d - mean_d[:, None]) * rstd[:, None], mean + mean_d, rstd


@triton.jit
def normalise_again(s, mean, rstd, H: tl.constexpr, BLOCK_H: tl.constexpr, first_column=0):
    """x̂ [BLOCK_M, BLOCK_H] from the forward's mean and rstd [BLOCK_M]."""
    xhat = (s - mean[:, None]) * rstd[:, None]  # [BLOCK_M, BLOCK_H]
    if H % BLOCK_H != 0:
        # Columns from H on: dy is 0 there, but 0 · x̂ is NaN where μ r overflows.
        xhat = tl.where(first_column + tl.arange(0, BLOCK_H)[None, :] < H, xhat, 0.0)
    return xhat


@triton.jit
def normalise_backward(dxhat, xhat, rstd, H: tl.constexpr, CENTRED: tl.constexpr = True, more=None, more_x=None):
    """ds = r (dx̂ − ⟨dx̂⟩ − x̂ ⟨dx̂∘x̂⟩), [BLOCK_M, BLOCK_H]; without CENTRED the term ⟨dx̂⟩ is absent.

    more, more_x: [BLOCK_M], Σ dx̂ and Σ dx̂∘x̂ over the columns that other programs hold.
    """
    sum_x = tl.sum(dxhat * xhat, axis=1)  # [BLOCK_M]
    if more_x is not None:
        sum_x += more_x
    mean_x = sum_x / H  # [BLOCK_M]
    if CENTRED:
        sum_1 = tl.sum(dxhat, axis=1)  # [BLOCK_M]
        if more is not None:
            sum_1 += more
        mean_1 = sum_1 / H  # [BLOCK_M]
        return (dxhat - mean_1[:, None] - xhat * mean_x[:, None]) * rstd[:, None]
    return (dxhat - xhat * mean_x[:, None]) * rstd[:, None]


def forward_config(hidden_size: int) -> Config:
    """32 elements a thread.

    Up to 1024 columns a row lies in one warp, which reduces it without a barrier. The masked columns of a width such as
    768 are then whole registers, and the compiler drops them.
    """
    columns = max(8, triton.next_power_of_2(hidden_size))  # Philox makes 8 columns a call
    return Config(min(64, max(1, 1024 // columns)), columns, min(16, max(1, columns // 1024)))
