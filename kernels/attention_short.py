"""Attention when a segment fits in one tile: the whole softmax at once, and one backward kernel.

`attention` has the equations. One program holds all queries and keys of its (segment, head), so the forward rescales
nothing, and the backward has all of P and dP: δ comes from registers (O is not read), five products
finish dQ, dK and dV, and no two programs write the same gradient. There is no loop.
"""

from __future__ import annotations

from ._triton import tl, triton
from .attention_tiles import (
    LOG2E,
    load_statistics,
    load_tile,
    probabilities,
    real_keys,
    segment_bounds,
    softmax_numerator,
    store_statistics,
    store_tile,
    visible,
    zero_rest,
)
from .dropout import dropout_keep


@triton.jit
def short_forward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    out_ptr,  # as q
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    cu_seqlens_q_ptr,  # [S + 1] int32, VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32, VARLEN
    key_mask_ptr,  # [B, n_k] uint8, MASKED
    seed_ptr,  # [1] int64, DROPOUT
    q_strides,  # (origin, row, head), elements
    k_strides,
    v_strides,
    out_strides,
    stats_strides,  # (m to l, origin, head)
    num_segments,
    num_heads,
    num_q,
    num_k,
    max_q,
    max_k,
    window,
    scale,
    p_threshold,
    keep_scale,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads of one segment run side by side: together they read whole rows of memory.
    segment, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    rows = tl.arange(0, BLOCK_M)
    if VARLEN and segment == num_segments:
        zero_rest(out_ptr, out_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if n_q <= 0:
        return
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)
    k = load_tile(k_ptr, k_strides, k_origin, head // GROUPS, 0, n_k, BLOCK_N, D, BLOCK_D, True)
    v = load_tile(v_ptr, v_strides, k_origin, head // GROUPS, 0, n_k, BLOCK_N, D, BLOCK_D, True)

    qk_scale = scale * LOG2E
    if VARLEN:
        # A segment longer than max_seqlen would be cut off: make that NaN, which is noticed.
        qk_scale = tl.where((n_q > max_q) | (n_k > max_k), float("nan"), qk_scale)
    real = real_keys(key_mask_ptr, segment, 0, n_k, BLOCK_N, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(visible(real, rows, 0, window, BLOCK_N, WINDOW), scores, float("-inf"))
    m = tl.max(scores, axis=1)
    m = tl.where(m == float("-inf"), 0.0, m)  # no real key: exp2(−inf − 0) = 0, where −inf − −inf would be NaN
    p = softmax_numerator(scores, m[:, None], qk_scale, EXACT)
    l = tl.sum(p, axis=1)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, 0, tl.program_id(0), BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out = out * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    store_tile(out_ptr, out, out_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)
    store_statistics(stats_ptr, m, tl.log2(l), stats_strides, q_origin, head, rows, n_q)


@triton.jit
def short_backward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H, D]
    v_ptr,  # as k
    dout_ptr,  # as q
    dq_ptr,  # as q
    dk_ptr,  # as k
    dv_ptr,  # as k
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    cu_seqlens_q_ptr,  # [S + 1] int32, VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32, VARLEN
    key_mask_ptr,  # [B, n_k] uint8, MASKED
    seed_ptr,  # [1] int64, DROPOUT
    q_strides,  # (origin, row, head), elements
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    stats_strides,  # (m to l, origin, head)
    num_segments,
    num_heads,
    num_q,
    num_k,
    window,
    scale,
    p_threshold,
    keep_scale,
    GROUPS: tl.constexpr,  # 1: the sum over a group's heads would hold dK and dV through a loop, and spill
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    segment, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    rows = tl.arange(0, BLOCK_M)
    if VARLEN and segment == num_segments:
        zero_rest(dq_ptr, dq_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        zero_rest(dk_ptr, dk_strides, head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
        zero_rest(dv_ptr, dv_strides, head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if (n_q <= 0) & (n_k <= 0):
        return
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)
    k = load_tile(k_ptr, k_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)
    p = probabilities(scores, m[:, None], log2_l[:, None], scale * LOG2E, EXACT)
    real = real_keys(key_mask_ptr, segment, 0, n_k, BLOCK_N, MASKED)
    p = tl.where(visible(real, rows, 0, window, BLOCK_N, WINDOW), p, 0.0)

    dout = load_tile(dout_ptr, dout_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)
    v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    p_kept = p
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, 0, tl.program_id(0), BLOCK_M, BLOCK_N)
        p_kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp, 0.0)
    dv = tl.dot(tl.trans(p_kept.to(dout.dtype)), dout, input_precision=PRECISION)
    store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D)

    delta = tl.sum(p * dp, axis=1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D)


__all__ = ["short_backward", "short_forward"]
