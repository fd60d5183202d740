"""Short route: a program holds all queries and keys of its (segment, head), so neither kernel has a loop.

attn_short_forward computes the whole softmax at once. attn_short_backward computes dQ, dK and dV from one P and one dP.
Equations and reasons: README.md.
"""

from __future__ import annotations

from ..backend import tl, triton
from .dropout_tile import keep_tile
from .tile import (
    LOG2E,
    load_statistics,
    load_tile,
    probabilities,
    real_keys,
    score_mask,
    segment_bounds,
    softmax_numerator,
    store_statistics,
    store_tile,
    zero_tail_rows,
)


@triton.jit
def locate_short_tile(num_heads):
    """(segment, head) of this program."""
    # Programs of one segment are adjacent: together they read whole rows of memory.
    return tl.program_id(0) // num_heads, tl.program_id(0) % num_heads


@triton.jit
def attn_short_forward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # [origin, n_k, H_k, D]
    out_ptr,  # [origin, n_q, H, D]
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    cu_seqlens_q_ptr,  # [S + 1] int32; None unless VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32; None unless VARLEN
    key_mask_ptr,  # [B, n_k] uint8; None unless MASKED
    seed_ptr,  # [1] int64; None unless DROPOUT
    q_strides,  # (origin, row, head), in elements; so are the others
    k_strides,
    v_strides,
    out_strides,
    stats_strides,  # (m to log₂ l, origin, head)
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
    GROUPS: tl.constexpr,  # query heads per key head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,  # the tensors are float32
    PRECISION: tl.constexpr,
):
    """O = c (P∘Z) V with P = softmax(scale · QKᵀ); the statistics (m, log₂ l) of P's rows."""
    segment, head = locate_short_tile(num_heads)
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if VARLEN and segment == num_segments:
        zero_tail_rows(out_ptr, out_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if n_q <= 0:
        return
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    key_head = head // GROUPS
    k = load_tile(k_ptr, k_strides, k_origin, key_head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr, v_strides, k_origin, key_head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]

    qk_scale = scale * LOG2E
    if VARLEN:
        # A segment longer than max_seqlen would be cut off without an error: return NaN.
        qk_scale = tl.where((n_q > max_q) | (n_k > max_k), float("nan"), qk_scale)
    real = real_keys(key_mask_ptr, segment, 0, n_k, BLOCK_N, MASKED)  # [BLOCK_N]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    mask = score_mask(real, rows, 0, window, BLOCK_N, WINDOW)  # [BLOCK_M, BLOCK_N], or [1, BLOCK_N]
    scores = tl.where(mask, scores, float("-inf"))  # [BLOCK_M, BLOCK_N]
    m = tl.max(scores, axis=1)  # [BLOCK_M]
    # Rows without a real key: exp2(−inf − 0) = 0, whereas −inf − (−inf) is NaN.
    m = tl.where(m == float("-inf"), 0.0, m)  # [BLOCK_M]
    p = softmax_numerator(scores, m[:, None], qk_scale, FP32)  # [BLOCK_M, BLOCK_N]
    l = tl.sum(p, axis=1)  # [BLOCK_M]
    if DROPOUT:
        plane = segment * num_heads + head
        keep = keep_tile(tl.load(seed_ptr), p_threshold, 0, 0, plane, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        p = tl.where(keep, p, 0.0)  # [BLOCK_M, BLOCK_N]
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    out = out * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]  # [BLOCK_M, BLOCK_D]
    store_tile(out_ptr, out, out_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)
    log2_l = tl.log2(l)  # [BLOCK_M]
    store_statistics(stats_ptr, m, log2_l, stats_strides, q_origin, head, rows, n_q)


@triton.jit
def attn_short_backward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H, D]
    v_ptr,  # [origin, n_k, H, D]
    dout_ptr,  # [origin, n_q, H, D]
    dq_ptr,  # [origin, n_q, H, D]
    dk_ptr,  # [origin, n_k, H, D]
    dv_ptr,  # [origin, n_k, H, D]
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    cu_seqlens_q_ptr,  # [S + 1] int32; None unless VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32; None unless VARLEN
    key_mask_ptr,  # [B, n_k] uint8; None unless MASKED
    seed_ptr,  # [1] int64; None unless DROPOUT
    q_strides,  # (origin, row, head), in elements; so are the others
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    stats_strides,  # (m to log₂ l, origin, head)
    num_segments,
    num_heads,
    num_q,
    num_k,
    window,
    scale,
    p_threshold,
    keep_scale,
    GROUPS: tl.constexpr,  # always 1: summing dK and dV over a group's heads in a loop would spill
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,  # the tensors are float32
    PRECISION: tl.constexpr,
):
    """dV = c (P∘Z)ᵀ dO; dQ = scale · dS K; dK = scale · dSᵀ Q.

    dS = P ∘ (dP − δ) with dP = c Z ∘ (dO Vᵀ) and δ_i = Σ_j P_ij dP_ij. c multiplies the finished sums:
    the variables dp, delta and ds are dP, δ and dS divided by c.
    """
    segment, head = locate_short_tile(num_heads)
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if VARLEN and segment == num_segments:
        zero_tail_rows(dq_ptr, dq_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        zero_tail_rows(dk_ptr, dk_strides, head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
        zero_tail_rows(dv_ptr, dv_strides, head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if (n_q <= 0) & (n_k <= 0):
        return
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    k = load_tile(k_ptr, k_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)  # [BLOCK_M], [BLOCK_M]
    p = probabilities(scores, m[:, None], log2_l[:, None], scale * LOG2E, FP32)  # [BLOCK_M, BLOCK_N]
    real = real_keys(key_mask_ptr, segment, 0, n_k, BLOCK_N, MASKED)  # [BLOCK_N]
    mask = score_mask(real, rows, 0, window, BLOCK_N, WINDOW)  # [BLOCK_M, BLOCK_N], or [1, BLOCK_N]
    p = tl.where(mask, p, 0.0)  # [BLOCK_M, BLOCK_N]

    # Keep the dropout mask in P's sign until dP is ready. Compute dV first, so that dV and dP are not both in registers
    # beside P. In float32 compute dP first: the operands are in registers too, and V would stay there during dV.
    if DROPOUT:
        plane = segment * num_heads + head
        keep = keep_tile(tl.load(seed_ptr), p_threshold, 0, 0, plane, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        p = tl.where(keep, p, -p)  # [BLOCK_M, BLOCK_N]
    # [BLOCK_M, BLOCK_D]
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True)
    if FP32:
        v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    p_kept = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p  # [BLOCK_M, BLOCK_N]
    dv = tl.dot(tl.trans(p_kept.to(dout.dtype)), dout, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D)
    if not FP32:
        v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        dp = tl.where(p > 0.0, dp, 0.0)  # [BLOCK_M, BLOCK_N]
        p = tl.abs(p)  # [BLOCK_M, BLOCK_N]
    delta = tl.sum(p * dp, axis=1)  # [BLOCK_M]
    ds = (p * (dp - delta[:, None])).to(q.dtype)  # [BLOCK_M, BLOCK_N]
    dq = tl.dot(ds, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D)
