"""Launches attention's kernels: chooses route, grid and arguments, for packed and padded tensors alike.

Packed tensors are [T, H, D] and have cu_seqlens; padded ones are [B, H, N, D]. A row's statistics (m, log₂ l) are
[2, H, T] or [2, B, H, N]. The kernels address all of them by strides (origin, row, head): see tile.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import dot_precision
from ..dropout import keep_threshold
from . import config as configs
from .long import attn_long_backward_dk_dv, attn_long_backward_dq, attn_long_forward
from .schedule import choose_grid
from .short import attn_short_backward, attn_short_forward

NO_WINDOW = -1  # the operators' value for window=None


class Problem(NamedTuple):
    """One attention call: the arguments of ``fusebert::attention``, in the order of its schema."""

    q: Tensor  # [T_q, H, D] or [B, H, N_q, D]
    k: Tensor  # [T_k, H_k, D] or [B, H_k, N_k, D]
    v: Tensor  # as k
    cu_seqlens_q: Tensor | None  # [S + 1] int32, packed; None: padded
    cu_seqlens_k: Tensor | None  # [S + 1] int32, packed; None: padded
    key_mask: Tensor | None  # [B, N_k] uint8, padded: not 0 where a key is real
    seed: Tensor | None  # [1] int64; None without dropout
    max_q: int  # rows of the longest segment of queries, an upper bound
    max_k: int  # rows of the longest segment of keys, an upper bound
    scale: float  # of the scores
    dropout_p: float
    window: int  # NO_WINDOW, or the largest distance of a query and a key

    @property
    def num_segments(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    @property
    def grid_segments(self) -> int:
        """Segments with programs. Packed tensors have one more: the rows after the last segment, to be zeroed."""
        return self.num_segments + (self.cu_seqlens_q is not None)

    @property
    def is_empty(self) -> bool:
        """There is nothing to compute or to write."""
        return self.q.numel() + self.k.numel() == 0

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def is_masked(self) -> bool:
        """The kernels take more registers: a padding mask, a window or grouped heads."""
        return self.key_mask is not None or self.window != NO_WINDOW or self.groups > 1

    def short_config(self, kernel: configs.ShortKernel) -> configs.Config | None:
        """None: take the long route."""
        shape = (self.q.shape[-1], self.max_q, self.max_k, self.groups)
        return configs.short_config(kernel, *shape, self.q.dtype, self.is_masked)

    def long_config(self, kernel: configs.LongKernel) -> configs.Config:
        return configs.long_config(kernel, self.q.shape[-1], self.q.dtype, self.is_masked)

    @property
    def short_grid(self) -> tuple[int]:
        """One program for each segment and head."""
        return (self.grid_segments * self.q.shape[1],)

    def query_grid(self, block: int) -> tuple[tuple[int], dict[str, Any]]:
        """(grid, arguments of `schedule.locate`) of a kernel with one program for each tile of ``block`` queries."""
        return self._long_grid(self.cu_seqlens_q, self.q, self.max_q, block)

    def key_grid(self, block: int) -> tuple[tuple[int], dict[str, Any]]:
        """`query_grid`, for tiles of ``block`` keys."""
        return self._long_grid(self.cu_seqlens_k, self.k, self.max_k, block)

    def _long_grid(
        self, cu_seqlens: Tensor | None, x: Tensor, longest: int, block: int
    ) -> tuple[tuple[int], dict[str, Any]]:
        num_tiles, slots = choose_grid(cu_seqlens, self.grid_segments, longest, x.shape[0], block)
        programs = num_tiles * x.shape[1] * (1 if slots is not None else self.grid_segments)
        return (programs,), {"num_tiles": num_tiles, "slots_ptr": slots, "SCHEDULED": slots is not None}

    def arguments(self, config: configs.Config) -> dict[str, Any]:
        """The arguments that all kernels have in common."""
        rows = 0 if self.cu_seqlens_q is not None else 2
        head_dim = self.q.shape[-1]
        return {
            "cu_seqlens_q_ptr": self.cu_seqlens_q,
            "cu_seqlens_k_ptr": self.cu_seqlens_k,
            "key_mask_ptr": self.key_mask,
            "seed_ptr": self.seed,
            "num_segments": self.num_segments,
            "num_heads": self.q.shape[1],
            "num_q": self.q.shape[rows],
            "num_k": self.k.shape[rows],
            "window": self.window,
            "scale": self.scale,
            "p_threshold": keep_threshold(self.dropout_p),
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
            "GROUPS": self.groups,
            "D": head_dim,
            "BLOCK_D": configs.block(head_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "VARLEN": self.cu_seqlens_q is not None,
            "MASKED": self.key_mask is not None,
            "WINDOW": self.window != NO_WINDOW,
            "DROPOUT": self.dropout_p > 0.0,
            "FP32": self.q.dtype == torch.float32,
            # TF32 operands are in registers, where more than 128 columns do not fit.
            "PRECISION": dot_precision(self.q.dtype) if head_dim <= 128 else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.maxnreg,
            "enable_fp_fusion": True,
        }


def new_output(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, in the layout that the next projection reads: [.., rows, heads, D]."""
    if x.dim() == 3:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, h, n, d = x.shape
    return torch.empty((b, n, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)


def new_stats(q: Tensor) -> Tensor:
    """Uninitialised, for (m, log₂ l) of each query and head: float32 [2, H, T] or [2, B, H, N]."""
    shape = (2, q.shape[1], q.shape[0]) if q.dim() == 3 else (2, *q.shape[:-1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def tensor_arguments(**tensors: Tensor) -> dict[str, Any]:
    """``{name}_ptr`` and ``{name}_strides`` (origin, row, head) of tensors [T, H, D] or [B, H, N, D]."""
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_strides"] = (x.stride(0), x.stride(0 if x.dim() == 3 else 2), x.stride(1))
    return arguments


def stats_arguments(stats: Tensor) -> dict[str, Any]:
    """The statistics and their strides (m to log₂ l, origin, head)."""
    strides = (stats.stride(0), 1 if stats.dim() == 3 else stats.stride(1), stats.stride(-2))
    return {"stats_ptr": stats, "stats_strides": strides}


def with_adjacent_columns(x: Tensor) -> Tensor:
    """x, copied only where the elements of a head are not adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(problem: Problem, out: Tensor, stats: Tensor) -> None:
    """Writes out and stats."""
    if problem.is_empty:
        return
    q, k, v = (with_adjacent_columns(x) for x in (problem.q, problem.k, problem.v))
    arguments = tensor_arguments(q=q, k=k, v=v, out=out) | stats_arguments(stats)
    arguments |= {"max_q": problem.max_q, "max_k": problem.max_k}
    with torch.cuda.device_of(q):
        if config := problem.short_config("short_forward"):
            attn_short_forward[problem.short_grid](**arguments, **problem.arguments(config))
        else:
            config = problem.long_config("long_forward")
            grid, tiles = problem.query_grid(config.block_m)
            attn_long_forward[grid](**arguments, **tiles, **problem.arguments(config))


def launch_backward(
    problem: Problem, out: Tensor, stats: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Writes dq, dk and dv. Only the long route reads ``out``."""
    if problem.is_empty:
        return
    q, k, v, dout = (with_adjacent_columns(x) for x in (problem.q, problem.k, problem.v, dout))
    arguments = tensor_arguments(q=q, k=k, v=v, dout=dout) | stats_arguments(stats)
    with torch.cuda.device_of(q):
        if config := problem.short_config("short_backward"):
            arguments |= tensor_arguments(dq=dq, dk=dk, dv=dv)
            attn_short_backward[problem.short_grid](**arguments, **problem.arguments(config))
            return
        arguments["delta_ptr"] = torch.empty_like(stats[0])  # written by dQ's kernel, read by dK's and dV's
        config = problem.long_config("long_backward_dq")
        grid, tiles = problem.query_grid(config.block_m)
        attn_long_backward_dq[grid](
            **arguments, **tensor_arguments(out=out, dq=dq), **tiles, **problem.arguments(config)
        )
        config = problem.long_config("long_backward_dk_dv")
        grid, tiles = problem.key_grid(config.block_n)
        attn_long_backward_dk_dv[grid](
            **arguments, **tensor_arguments(dk=dk, dv=dv), **tiles, **problem.arguments(config)
        )
