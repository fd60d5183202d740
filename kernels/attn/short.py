"""Attention when a segment fits in one tile: the whole softmax at once, and one backward kernel.

`attention` has the equations. One program holds all queries and keys of its (segment, head), so the forward rescales
nothing, and the backward has all of P and dP: δ comes from registers (O is not read), five products
finish dQ, dK and dV, and no two programs write the same gradient. There is no loop.

Segments of at most 32 rows leave most of a matrix instruction's 64 rows empty, so there a tile holds HEADS heads, one
below the other, and the scores between different heads are masked: HEADS times the multiplications, which these shapes
have to spare (N/2 FLOPs a byte becomes HEADS · N/2, at most 32), for a HEADS-th of the programs. Heads rather than
neighbouring segments: they have the same rows, so a tile has no ragged seams, and their memory is adjacent.
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
    segment_bounds,
    softmax_numerator,
    store_statistics,
    store_tile,
    tile_rows,
    visible,
    zero_rest,
)


@triton.jit
def _tile(num_heads, BLOCK_M: tl.constexpr, HEADS: tl.constexpr):
    """(segment, first head, [BLOCK_M] rows, dropout plane of the first head) of this program."""
    # Heads of one segment run side by side: together they read whole rows of memory.
    tiles = num_heads // HEADS
    segment, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles * HEADS
    return segment, head, tile_rows(BLOCK_M, HEADS)[0], segment * num_heads + head


@triton.jit
def _visible(
    real, rows, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr
):
    """`visible` for a tile of HEADS heads, which do not see each other."""
    if HEADS == 1:
        return visible(real, rows, 0, window, BLOCK_N, WINDOW)
    else:
        keys, key_heads = tile_rows(BLOCK_N, HEADS)
        seen = real[None, :] & (tile_rows(BLOCK_M, HEADS)[1][:, None] == key_heads[None, :])
        if WINDOW:
            seen = seen & (tl.abs(rows[:, None] - keys[None, :]) <= window)
        return seen


@triton.jit
def _kept(seed_ptr, p_threshold, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr):
    """`keep_tile` for a tile of HEADS heads: drawn for a head's own keys alone, and repeated across the tile."""
    keep = keep_tile(tl.load(seed_ptr), p_threshold, 0, 0, plane, BLOCK_M, BLOCK_N // HEADS, HEADS)
    if HEADS > 1:
        keep = tl.broadcast_to(keep[:, None, :], (BLOCK_M, HEADS, BLOCK_N // HEADS))
        keep = tl.reshape(keep, (BLOCK_M, BLOCK_N))
    return keep


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
    HEADS: tl.constexpr,  # of a tile; 1 where GROUPS > 1
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
    segment, head, rows, plane = _tile(num_heads, BLOCK_M, HEADS)
    if VARLEN and segment == num_segments:
        zero_rest(out_ptr, out_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D, HEADS)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if n_q <= 0:
        return
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True, HEADS)
    k = load_tile(k_ptr, k_strides, k_origin, head // GROUPS, 0, n_k, BLOCK_N, D, BLOCK_D, True, HEADS)
    v = load_tile(v_ptr, v_strides, k_origin, head // GROUPS, 0, n_k, BLOCK_N, D, BLOCK_D, True, HEADS)

    qk_scale = scale * LOG2E
    if VARLEN:
        # A segment longer than max_seqlen would be cut off: make that NaN, which is noticed.
        qk_scale = tl.where((n_q > max_q) | (n_k > max_k), float("nan"), qk_scale)
    real = real_keys(key_mask_ptr, segment, 0, n_k, BLOCK_N, MASKED, HEADS)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(_visible(real, rows, window, BLOCK_M, BLOCK_N, WINDOW, HEADS), scores, float("-inf"))
    m = tl.max(scores, axis=1)
    m = tl.where(m == float("-inf"), 0.0, m)  # no real key: exp2(−inf − 0) = 0, where −inf − −inf would be NaN
    p = softmax_numerator(scores, m[:, None], qk_scale, EXACT)
    l = tl.sum(p, axis=1)
    if DROPOUT:
        keep = _kept(seed_ptr, p_threshold, plane, BLOCK_M, BLOCK_N, HEADS)
        p = tl.where(keep, p, 0.0)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out = out * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    store_tile(out_ptr, out, out_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, HEADS)
    store_statistics(stats_ptr, m, tl.log2(l), stats_strides, q_origin, head + tile_rows(BLOCK_M, HEADS)[1], rows, n_q)


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
    HEADS: tl.constexpr,  # of a tile
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
    segment, head, rows, plane = _tile(num_heads, BLOCK_M, HEADS)
    if VARLEN and segment == num_segments:
        zero_rest(dq_ptr, dq_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D, HEADS)
        zero_rest(dk_ptr, dk_strides, head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D, HEADS)
        zero_rest(dv_ptr, dv_strides, head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D, HEADS)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if (n_q <= 0) & (n_k <= 0):
        return
    q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True, HEADS)
    k = load_tile(k_ptr, k_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True, HEADS)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head + tile_rows(BLOCK_M, HEADS)[1], rows, n_q)
    p = probabilities(scores, m[:, None], log2_l[:, None], scale * LOG2E, EXACT)
    real = real_keys(key_mask_ptr, segment, 0, n_k, BLOCK_N, MASKED, HEADS)
    p = tl.where(_visible(real, rows, window, BLOCK_M, BLOCK_N, WINDOW, HEADS), p, 0.0)

    # Until dP is here a minus says who is dropped. dV goes first, so that only one of the two lies beside P in the
    # registers; not in float32, whose operands lie there as well: V would wait in them.
    if DROPOUT:
        p = tl.where(_kept(seed_ptr, p_threshold, plane, BLOCK_M, BLOCK_N, HEADS), p, -p)
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, True, HEADS)
    if EXACT:
        v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True, HEADS)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    p_kept = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p
    dv = tl.dot(tl.trans(p_kept.to(dout.dtype)), dout, input_precision=PRECISION)
    store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, HEADS)
    if not EXACT:
        v = load_tile(v_ptr, v_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, True, HEADS)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(p > 0.0, dp, 0.0)
        p = tl.abs(p)
    delta = tl.sum(p * dp, axis=1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, 0, n_q, BLOCK_M, D, BLOCK_D, HEADS)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, head, 0, n_k, BLOCK_N, D, BLOCK_D, HEADS)


__all__ = ["short_backward", "short_forward"]
