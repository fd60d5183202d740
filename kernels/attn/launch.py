"""How attention's kernels are launched: the choice of route, grids and arguments, for packed and padded tensors alike.

Packed tensors are [T, H, D] and come with cu_seqlens, padded ones [B, H, N, D] without. The statistics of a query, m
and log₂ l, have the same axes, rows last: [2, H, T] and [2, B, H, N]. The kernels see both as (origin, row, head).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import dot_precision, triton
from ..dropout import keep_threshold
from . import config as attention_config
from .long import long_backward_dk_dv, long_backward_dq, long_forward
from .schedule import grid
from .short import short_backward, short_forward

NO_WINDOW = -1  # what the operators take for window=None


class Problem(NamedTuple):
    """One call, as both directions need it. ``max_q``, ``max_k``: no segment is longer."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    scale: float
    dropout_p: float
    window: int

    @property
    def segments(self) -> int:
        """Segments that get programs: packed, one more, for the rows behind the last."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel()

    @property
    def empty(self) -> bool:
        """Nothing to compute or to write."""
        return self.q.numel() + self.k.numel() == 0

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def masked(self) -> bool:
        """It takes more registers than plain attention."""
        return self.key_mask is not None or self.window != NO_WINDOW or self.groups > 1

    def query_tiles(self, block: int) -> tuple[int, dict[str, Any]]:
        """(programs, what they find their tile by) of a kernel that owns ``block`` queries."""
        return self._tiles(self.cu_seqlens_q, self.q, self.max_q, block)

    def key_tiles(self, block: int) -> tuple[int, dict[str, Any]]:
        return self._tiles(self.cu_seqlens_k, self.k, self.max_k, block)

    def _tiles(self, cu_seqlens: Tensor | None, x: Tensor, longest: int, block: int) -> tuple[int, dict[str, Any]]:
        num_tiles, slots = grid(cu_seqlens, self.segments, longest, x.shape[0], block)
        programs = num_tiles * x.shape[1] * (1 if slots is not None else self.segments)
        return programs, {"num_tiles": num_tiles, "slots_ptr": slots, "SCHEDULED": slots is not None}

    def short_forward(self) -> attention_config.Config | None:
        shape = (self.q.shape[-1], self.q.shape[1], self.max_q, self.max_k, self.groups)
        return attention_config.short_forward(*shape, self.q.dtype, self.masked)

    def short_backward(self) -> attention_config.Config | None:
        shape = (self.q.shape[-1], self.q.shape[1], self.max_q, self.max_k, self.groups)
        return attention_config.short_backward(*shape, self.q.dtype, self.masked)

    def arguments(self, config: attention_config.Config) -> dict[str, Any]:
        """What every kernel takes."""
        rows = 0 if self.cu_seqlens_q is not None else 2
        head_dim = self.q.shape[-1]
        return {
            "cu_seqlens_q_ptr": self.cu_seqlens_q,
            "cu_seqlens_k_ptr": self.cu_seqlens_k,
            "key_mask_ptr": self.key_mask,
            "seed_ptr": self.seed,
            "num_segments": self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1,
            "num_heads": self.q.shape[1],
            "num_q": self.q.shape[rows],
            "num_k": self.k.shape[rows],
            "window": self.window,
            "scale": self.scale,
            "p_threshold": keep_threshold(self.dropout_p),
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
            "GROUPS": self.groups,
            "D": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "VARLEN": self.cu_seqlens_q is not None,
            "MASKED": self.key_mask is not None,
            "WINDOW": self.window != NO_WINDOW,
            "DROPOUT": self.dropout_p > 0.0,
            "EXACT": self.q.dtype == torch.float32,
            # TF32 is allowed, not asked for: its operands are registers, and of 256 columns they do not fit.
            "PRECISION": dot_precision(self.q.dtype) if head_dim <= 128 else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.maxnreg,
        }


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(origin, row, head) strides of [T, H, D] or [B, H, N, D]."""
    return (x.stride(0), x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(2), x.stride(1))


def _stats_strides(stats: Tensor) -> tuple[int, int, int]:
    """(m to l, origin, head) strides of [2, H, T] or [2, B, H, N]."""
    return (stats.stride(0), 1 if stats.dim() == 3 else stats.stride(1), stats.stride(-2))


def forward(a: Problem, out: Tensor, stats: Tensor) -> None:
    """Writes out and stats."""
    if a.empty:
        return
    tensors = (a.q, a.k, a.v, out, stats)
    strides = {"q_strides": _strides(a.q), "k_strides": _strides(a.k), "v_strides": _strides(a.v)}
    strides |= {"out_strides": _strides(out), "stats_strides": _stats_strides(stats)}
    if config := a.short_forward():
        short_forward[(a.segments * a.q.shape[1] // config.heads,)](
            *tensors, **strides, max_q=a.max_q, max_k=a.max_k, HEADS=config.heads, **a.arguments(config)
        )
    else:
        config = attention_config.long_forward(a.q.shape[-1], a.q.dtype, a.masked)
        programs, tiles = a.query_tiles(config.block_m)
        long_forward[(programs,)](*tensors, **strides, **tiles, max_q=a.max_q, max_k=a.max_k, **a.arguments(config))


def backward(a: Problem, out: Tensor, stats: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq, dk and dv. ``out`` is read by the long route alone."""
    if a.empty:
        return
    of_q, of_k = {"q_strides": _strides(a.q)}, {"k_strides": _strides(a.k), "v_strides": _strides(a.v)}
    strides = {**of_q, **of_k, "dout_strides": _strides(dout), "stats_strides": _stats_strides(stats)}
    to_q, to_k = {"dq_strides": _strides(dq)}, {"dk_strides": _strides(dk), "dv_strides": _strides(dv)}
    if config := a.short_backward():
        short_backward[(a.segments * a.q.shape[1] // config.heads,)](
            a.q, a.k, a.v, dout, dq, dk, dv, stats,
            **strides, **to_q, **to_k, HEADS=config.heads, **a.arguments(config),
        )  # fmt: skip
        return
    delta = torch.empty_like(stats[0])
    config = attention_config.long_backward_dq(a.q.shape[-1], a.q.dtype, a.masked)
    programs, tiles = a.query_tiles(config.block_m)
    long_backward_dq[(programs,)](
        a.q, a.k, a.v, out, dout, dq, stats, delta,
        out_strides=_strides(out), **tiles, **strides, **to_q, **a.arguments(config),
    )  # fmt: skip
    config = attention_config.long_backward_dk_dv(a.q.shape[-1], a.q.dtype, a.masked)
    programs, tiles = a.key_tiles(config.block_n)
    long_backward_dk_dv[(programs,)](
        a.q, a.k, a.v, dout, dk, dv, stats, delta, **tiles, **strides, **to_k, **a.arguments(config)
    )


def like_query(q: Tensor) -> Tensor:
    """Uninitialised, as q; memory is [.., rows, heads, D] whatever q's, which is what the next projection reads."""
    if q.dim() == 3:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    b, h, n, d = q.shape
    return torch.empty((b, n, h, d), dtype=q.dtype, device=q.device).transpose(1, 2)


def new_stats(q: Tensor) -> Tensor:
    shape = (2, q.shape[1], q.shape[0]) if q.dim() == 3 else (2, *q.shape[:-1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


__all__ = ["NO_WINDOW", "Problem", "backward", "forward", "like_query", "new_stats"]
