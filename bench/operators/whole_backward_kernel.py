"""Attention's backward of up to 256 tokens in one program: an experiment, raced by `bench tune --kernels rows`.

Beyond 128 tokens `kernels.attn.long` has one kernel for dQ and one for dK and dV. Both compute S and dP, draw the
dropout mask and read q, k, v and dout. Here a program has all queries of its (segment, head), with their sums dQ in
registers, and visits the keys in blocks, whose dK and dV are then complete: five products for seven, each mask once,
each tensor read once. If a GPU finds it faster, it becomes a third route.

Not supported, because the race does not need it: a padding mask, windows, grouped heads, and zeros in the rows after
the last segment.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from torch import Tensor

from ...kernels.attn import launch
from ...kernels.attn.config import Config, block
from ...kernels.attn.dropout_tile import keep_tile
from ...kernels.attn.launch import NO_WINDOW, Problem, stats_arguments, tensor_arguments
from ...kernels.attn.tile import LOG2E, load_statistics, load_tile, probabilities, segment_bounds, store_tile
from ...kernels.backend import tl, triton

MOST_ROWS = 256


@triton.jit
def attn_whole_backward(
    q_ptr,  # the arguments of attn_long_backward_dq and attn_long_backward_dk_dv
    k_ptr,
    v_ptr,
    out_ptr,
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
    out_strides,
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
    BLOCK_M: tl.constexpr,  # at least the rows of the longest segment
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, dK and dV of one (segment, head): the equations of attn_short_backward, with δ_i = Σ_d O_id dO_id.

    The variables dp, delta and ds are dP, δ and dS divided by c, as there.
    """
    pair = tl.program_id(0)
    segment, head = pair // num_heads, pair % num_heads
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    out = load_tile(out_ptr, out_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1) / keep_scale  # [BLOCK_M]
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)  # [BLOCK_M], [BLOCK_M]
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # [BLOCK_M, BLOCK_D]
    for start in range(0, n_k, BLOCK_N):
        k = load_tile(k_ptr, k_strides, k_origin, head, start, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr, v_strides, k_origin, head, start, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p = probabilities(scores, m[:, None], log2_l[:, None], scale * LOG2E, FP32)  # [BLOCK_M, BLOCK_N]
        p = tl.where(start + tl.arange(0, BLOCK_N)[None, :] < n_k, p, 0.0)
        if DROPOUT:  # P's sign is the mask
            p = tl.where(keep_tile(tl.load(seed_ptr), p_threshold, 0, start, pair, BLOCK_M, BLOCK_N), p, -p)
        p_kept = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p
        dv = tl.dot(tl.trans(p_kept.to(dout.dtype)), dout, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, head, start, n_k, BLOCK_N, D, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            dp = tl.where(p > 0.0, dp, 0.0)
            p = tl.abs(p)
        ds = (p * (dp - delta[:, None])).to(q.dtype)  # [BLOCK_M, BLOCK_N]
        dq += tl.dot(ds, k, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, head, start, n_k, BLOCK_N, D, BLOCK_D)
    store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)


@dataclasses.dataclass(frozen=True)
class WholeBackward:
    """How the kernel is launched. ``block_n``: keys of a block, for Hopper's matrix instruction at least 64."""

    block_n: int
    num_warps: int

    name = attn_whole_backward.fn.__name__

    def launch(
        self, problem: Problem, out: Tensor, stats: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """As `attn.launch.launch_backward`."""
        if problem.is_masked or problem.window != NO_WINDOW or problem.max_q > MOST_ROWS:
            raise ValueError(f"this kernel has no mask, no window, no grouped heads, and at most {MOST_ROWS} queries")
        tensors = {
            "q": problem.q,
            "k": problem.k,
            "v": problem.v,
            "out": out,
            "dout": dout,
            "dq": dq,
            "dk": dk,
            "dv": dv,
        }
        arguments = problem.arguments(Config(block(problem.max_q), self.block_n, self.num_warps, 1))
        for unused in ("key_mask_ptr", "window", "GROUPS", "MASKED", "WINDOW"):
            del arguments[unused]
        grid = (problem.num_segments * problem.q.shape[1],)
        attn_whole_backward[grid](**tensor_arguments(**tensors), **stats_arguments(stats), **arguments)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, `attn.launch.launch_backward` launches this kernel."""
        with mock.patch.object(launch, "launch_backward", self.launch):
            yield
