"""Short attention in a persistent grid: an experiment that `fusebert bench tune --kernels rows` predicts and races.

Each program goes through many (segment, head) pairs, and the loads of the next pair are in flight while it computes the
present one: `tl.range` with two stages copies q, k, v and dout to shared memory asynchronously, without registers. In
`kernels.attn.short` a program has one pair, so that only other resident programs hide its loads, and at 128 tokens the
backward has none. The mathematics is that of short.py. If a GPU finds it faster, it replaces that.

Not supported, because the race does not need it: a padding mask, windows, grouped heads, and zeros in the rows after
the last segment.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from ...kernels import rows
from ...kernels.attn import launch
from ...kernels.attn.dropout_tile import keep_tile
from ...kernels.attn.tile import (
    LOG2E,
    load_statistics,
    load_tile,
    probabilities,
    segment_bounds,
    softmax_numerator,
    store_statistics,
    store_tile,
)
from ...kernels.backend import tl, triton


@triton.jit
def attn_persistent_forward(
    q_ptr,  # the arguments of attn_short_forward
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    stats_strides,
    num_segments,
    num_heads,
    num_q,
    num_k,
    scale,
    p_threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,  # tiles of q, k and v in shared memory
):
    """`attn_short_forward` of all pairs program, program + programs, …"""
    query_rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    for pair in tl.range(tl.program_id(0), num_segments * num_heads, tl.num_programs(0), num_stages=STAGES):
        segment, head = pair // num_heads, pair % num_heads
        q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
        k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
        q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        k = load_tile(k_ptr, k_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < n_k, scores, float("-inf"))
        m = tl.max(scores, axis=1)  # [BLOCK_M]
        m = tl.where(m == float("-inf"), 0.0, m)
        p = softmax_numerator(scores, m[:, None], scale * LOG2E, FP32)  # [BLOCK_M, BLOCK_N]
        l = tl.sum(p, axis=1)  # [BLOCK_M]
        if DROPOUT:
            p = tl.where(keep_tile(tl.load(seed_ptr), p_threshold, 0, 0, pair, BLOCK_M, BLOCK_N), p, 0.0)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        out = out * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
        store_tile(out_ptr, out, out_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)
        store_statistics(stats_ptr, m, tl.log2(l), stats_strides, q_origin, head, query_rows, n_q)


@triton.jit
def attn_persistent_backward(
    q_ptr,  # the arguments of attn_short_backward
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stats_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    stats_strides,
    num_segments,
    num_heads,
    num_q,
    num_k,
    scale,
    p_threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,  # tiles of q, k, v and dout in shared memory
):
    """`attn_short_backward` of all pairs program, program + programs, …"""
    query_rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    for pair in tl.range(tl.program_id(0), num_segments * num_heads, tl.num_programs(0), num_stages=STAGES):
        segment, head = pair // num_heads, pair % num_heads
        q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
        k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
        q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        k = load_tile(k_ptr, k_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        # [BLOCK_M, BLOCK_D]
        dout = load_tile(dout_ptr, dout_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)
        v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, query_rows, n_q)  # [BLOCK_M], [BLOCK_M]
        p = probabilities(scores, m[:, None], log2_l[:, None], scale * LOG2E, FP32)  # [BLOCK_M, BLOCK_N]
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < n_k, p, 0.0)
        if DROPOUT:  # P's sign is the mask
            p = tl.where(keep_tile(tl.load(seed_ptr), p_threshold, 0, 0, pair, BLOCK_M, BLOCK_N), p, -p)
        p_kept = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p
        dv = tl.dot(tl.trans(p_kept.to(dout.dtype)), dout, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            dp = tl.where(p > 0.0, dp, 0.0)
            p = tl.abs(p)
        delta = tl.sum(p * dp, axis=1)  # [BLOCK_M]
        ds = (p * (dp - delta[:, None])).to(q.dtype)  # [BLOCK_M, BLOCK_N]
        dq = tl.dot(ds, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D)


@dataclasses.dataclass(frozen=True)
class Persistent:
    """How a persistent kernel is launched.

    Attributes:
        kernel: the one that it takes the place of.
        blocks: programs on each multiprocessor, all of them resident.
    """

    kernel: str
    num_warps: int
    num_stages: int
    blocks: int

    @property
    def name(self) -> str:
        return self._function().fn.__name__

    def _function(self) -> Any:
        return attn_persistent_forward if self.kernel == "attn_short_forward" else attn_persistent_backward

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """In place of the kernel's own: the grid is as large as the GPU."""
        return self._launch

    def _launch(self, q_ptr: Any, **arguments: Any) -> None:
        """Takes what `attn.launch` gives to the kernel with one pair a program."""
        if arguments.pop("MASKED") or arguments.pop("WINDOW") or arguments.pop("GROUPS") > 1:
            raise ValueError("the persistent kernels have no padding mask, no window and no grouped heads")
        for unused in ("key_mask_ptr", "window", "max_q", "max_k", "maxnreg"):
            arguments.pop(unused, None)
        pairs = arguments["num_segments"] * arguments["num_heads"]
        programs = min(pairs, rows.most_programs(q_ptr.device, 16 // self.blocks))
        arguments |= {"num_warps": self.num_warps, "STAGES": self.num_stages}
        self._function()[(programs,)](q_ptr, **arguments)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, the short route launches this kernel."""
        with mock.patch.object(launch, self.kernel, self):
            yield
