"""Attention for segments of any length: FlashAttention-2's split, online softmax forward, dQ and dK/dV kernels.

`attention` has the equations. A program of the forward and of dQ owns a tile of queries and walks the keys; one of
dK/dV owns a tile of keys and walks the queries: every gradient has one writer, so there are no atomics and the same
inputs give the same bits. dQ runs first because it holds dO and O: it leaves δ' = δ / c behind for dK and dV. Loops
check no bounds: a ragged last tile is peeled. A window skips the tiles it cannot see.
"""

from __future__ import annotations

from ..backend import tl, triton
from .dropout_tile import keep_tile, keep_tile_transposed
from .schedule import locate
from .tile import (
    LOG2E,
    last_real_key,
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


@triton.jit
def _tile_range(start, rows, others, window, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, WINDOW: tl.constexpr):
    """(first, whole, end): the other side's tiles that rows start … start + BLOCK − 1 see; whole … end is ragged."""
    first, end = 0, others
    if WINDOW:
        first = tl.maximum(start - window, 0) // BLOCK_OTHER * BLOCK_OTHER
        end = tl.minimum(tl.minimum(start + BLOCK, rows) + window, others)
    whole = tl.minimum(tl.cdiv(end, BLOCK_OTHER), others // BLOCK_OTHER) * BLOCK_OTHER
    return first, whole, end


@triton.jit
def _nothing(num_heads):
    """0.0, which the compiler does not know.

    Added to an operand in a loop, it keeps the compiler from taking the operand out of it. A float32 product on the
    plain cores holds whole rows of both operands: the one that does not change would fill the registers beyond D = 16.
    """
    return tl.minimum(num_heads, 0).to(tl.float32)


@triton.jit
def _forward_step(
    acc,
    l,
    m,
    q,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    seed_ptr,
    k_strides,
    v_strides,
    k_origin,
    segment,
    key_head,
    start_m,
    start_n,
    n_k,
    num_k,
    plane,
    window,
    qk_scale,
    p_threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile of the online softmax: (acc, l, m) after keys start_n … start_n + BLOCK_N − 1."""
    k = load_tile(k_ptr, k_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CHECK or MASKED or WINDOW:
        real = real_keys(key_mask_ptr, segment, start_n, num_k if MASKED else n_k, BLOCK_N, MASKED)
        scores = tl.where(
            visible(real, start_m + tl.arange(0, BLOCK_M), start_n, window, BLOCK_N, WINDOW), scores, float("-inf")
        )
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    if MASKED or WINDOW:
        m_new = tl.where(m_new == float("-inf"), -1e30, m_new)  # no real key so far: finite, so that no NaN arises
    p = softmax_numerator(scores, m_new[:, None], qk_scale, EXACT)
    alpha = tl.exp2((m - m_new) * qk_scale)
    l = l * alpha + tl.sum(p, axis=1)
    if DROPOUT:
        p = tl.where(keep_tile(tl.load(seed_ptr), p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N), p, 0.0)
    v = load_tile(v_ptr, v_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l, m_new


@triton.jit
def long_forward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    out_ptr,  # as q
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    cu_seqlens_q_ptr,  # [S + 1] int32, VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32, VARLEN
    slots_ptr,  # `schedule_tiles`, SCHEDULED
    key_mask_ptr,  # [B, n_k] uint8, MASKED
    seed_ptr,  # [1] int64, DROPOUT
    q_strides,  # (origin, row, head), elements
    k_strides,
    v_strides,
    out_strides,
    stats_strides,  # (m to l, origin, head)
    num_tiles,  # `locate`
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
    SCHEDULED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    segment, head, start_m = locate(
        slots_ptr, num_tiles, cu_seqlens_q_ptr, num_segments, num_heads, num_q, BLOCK_M, VARLEN, SCHEDULED
    )
    plane = segment * num_heads + head
    if VARLEN and segment == num_segments:
        if start_m == 0:
            zero_rest(out_ptr, out_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_m >= n_q:
        return
    qk_scale = scale * LOG2E
    if VARLEN:
        # A segment longer than max_seqlen has rows that no program owns: make that NaN, which is noticed.
        qk_scale = tl.where((n_q > max_q) | (n_k > max_k), float("nan"), qk_scale)
    if MASKED:
        n_k = last_real_key(key_mask_ptr, segment, n_k)

    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    first, whole, end = _tile_range(start_m, n_q, n_k, window, BLOCK_M, BLOCK_N, WINDOW)
    nothing = _nothing(num_heads)
    if MASKED or WINDOW:
        whole = end  # every tile is masked anyway: one loop
    for start_n in range(first, whole, BLOCK_N):
        acc, l, m = _forward_step(
            acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin, segment, head // GROUPS,
            start_m, start_n, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, MASKED or WINDOW, EXACT, PRECISION,
        )  # fmt: skip
        if EXACT and BLOCK_D > 16:
            q += nothing
    if not (MASKED or WINDOW) and whole < end:
        acc, l, m = _forward_step(
            acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin, segment, head // GROUPS,
            start_m, whole, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, True, EXACT, PRECISION,
        )  # fmt: skip

    out = acc * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    store_tile(out_ptr, out, out_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D)
    store_statistics(stats_ptr, m, tl.log2(l), stats_strides, q_origin, head, rows, n_q)


@triton.jit
def _dq_step(
    dq,
    q,
    dout,
    m,
    log2_l,
    delta,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    seed_ptr,
    k_strides,
    v_strides,
    k_origin,
    segment,
    key_head,
    start_m,
    start_n,
    n_k,
    num_k,
    plane,
    window,
    qk_scale,
    p_threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq + dS K over keys start_n … start_n + BLOCK_N − 1."""
    k = load_tile(k_ptr, k_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)
    v = load_tile(v_ptr, v_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(scores, m[:, None], log2_l[:, None], qk_scale, EXACT)
    if CHECK or MASKED or WINDOW:
        # Needed although a key that does not exist is zeros here: its P, exp(0 − L), may be inf.
        real = real_keys(key_mask_ptr, segment, start_n, num_k if MASKED else n_k, BLOCK_N, MASKED)
        p = tl.where(visible(real, start_m + tl.arange(0, BLOCK_M), start_n, window, BLOCK_N, WINDOW), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(keep_tile(tl.load(seed_ptr), p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N), dp, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def long_backward_dq(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    out_ptr,  # as q
    dout_ptr,  # as q
    dq_ptr,  # as q
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    delta_ptr,  # [origin, H, n_q] float32, written
    cu_seqlens_q_ptr,  # [S + 1] int32, VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32, VARLEN
    slots_ptr,  # `schedule_tiles`, SCHEDULED
    key_mask_ptr,  # [B, n_k] uint8, MASKED
    seed_ptr,  # [1] int64, DROPOUT
    q_strides,  # (origin, row, head), elements
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    stats_strides,  # (m to l, origin, head)
    num_tiles,  # `locate`
    num_segments,
    num_heads,
    num_q,
    num_k,
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
    SCHEDULED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    segment, head, start_m = locate(
        slots_ptr, num_tiles, cu_seqlens_q_ptr, num_segments, num_heads, num_q, BLOCK_M, VARLEN, SCHEDULED
    )
    plane = segment * num_heads + head
    if VARLEN and segment == num_segments:
        if start_m == 0:
            zero_rest(dq_ptr, dq_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_m >= n_q:
        return
    qk_scale = scale * LOG2E
    if MASKED:
        n_k = last_real_key(key_mask_ptr, segment, n_k)

    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    out = load_tile(out_ptr, out_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1) / keep_scale
    delta_ptr += q_origin * stats_strides[1] + head * stats_strides[2]
    tl.store(delta_ptr + rows, delta, mask=rows < n_q)

    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    first, whole, end = _tile_range(start_m, n_q, n_k, window, BLOCK_M, BLOCK_N, WINDOW)
    nothing = _nothing(num_heads)
    if MASKED or WINDOW:
        whole = end
    for start_n in range(first, whole, BLOCK_N):
        dq = _dq_step(
            dq, q, dout, m, log2_l, delta, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin,
            segment, head // GROUPS, start_m, start_n, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, MASKED or WINDOW, EXACT, PRECISION,
        )  # fmt: skip
        if EXACT and BLOCK_D > 16:
            q += nothing
            dout += nothing
    if not (MASKED or WINDOW) and whole < end:
        dq = _dq_step(
            dq, q, dout, m, log2_l, delta, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin,
            segment, head // GROUPS, start_m, whole, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, True, EXACT, PRECISION,
        )  # fmt: skip
    store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D)


@triton.jit
def _dk_dv_step(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    stats_ptr,
    delta_ptr,
    seed_ptr,
    q_strides,
    dout_strides,
    stats_strides,
    q_origin,
    head,
    start_m,
    start_n,
    n_q,
    plane,
    window,
    qk_scale,
    p_threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dk + dSᵀ Q, dv + (P∘Z)ᵀ dO) over queries start_m … start_m + BLOCK_M − 1."""
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, CHECK)
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, CHECK)
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)
    delta_ptr += q_origin * stats_strides[1] + head * stats_strides[2]
    delta = tl.load(delta_ptr + rows, mask=rows < n_q, other=0.0)
    # Transposed, [keys, queries]: Pᵀ and dSᵀ are then the left factors of their products, straight from registers.
    if EXACT:
        # The forward's own product, for its very bits: another order of summation would show in scores − m.
        scores_t = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
    else:
        scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p_t = probabilities(scores_t, m[None, :], log2_l[None, :], qk_scale, EXACT)
    if WINDOW:
        keys = start_n + tl.arange(0, BLOCK_N)
        p_t = tl.where(tl.abs(keys[:, None] - rows[None, :]) <= window, p_t, 0.0)
    # In the order that `short_backward` explains.
    if DROPOUT:
        keep = keep_tile_transposed(tl.load(seed_ptr), p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N)
        p_t = tl.where(keep, p_t, -p_t)
    if EXACT:
        dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    p_kept = tl.maximum(p_t, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p_t
    dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
    if not EXACT:
        dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if DROPOUT:
        dp_t = tl.where(p_t > 0.0, dp_t, 0.0)
        p_t = tl.abs(p_t)
    ds_t = p_t * (dp_t - delta[None, :])
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def long_backward_dk_dv(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    dout_ptr,  # as q
    dk_ptr,  # as k
    dv_ptr,  # as k
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    delta_ptr,  # [origin, H, n_q] float32
    cu_seqlens_q_ptr,  # [S + 1] int32, VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32, VARLEN
    slots_ptr,  # `schedule_tiles`, SCHEDULED
    key_mask_ptr,  # [B, n_k] uint8, MASKED
    seed_ptr,  # [1] int64, DROPOUT
    q_strides,  # (origin, row, head), elements
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    stats_strides,  # (m to l, origin, head)
    num_tiles,  # `locate`
    num_segments,
    num_heads,
    num_q,
    num_k,
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
    SCHEDULED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    segment, key_head, start_n = locate(
        slots_ptr, num_tiles, cu_seqlens_k_ptr, num_segments, num_heads // GROUPS, num_k, BLOCK_N, VARLEN, SCHEDULED
    )
    if VARLEN and segment == num_segments:
        if start_n == 0:
            zero_rest(dk_ptr, dk_strides, key_head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
            zero_rest(dv_ptr, dv_strides, key_head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_n >= n_k:
        return
    qk_scale = scale * LOG2E
    k = load_tile(k_ptr, k_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, True)
    v = load_tile(v_ptr, v_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, True)
    real = real_keys(key_mask_ptr, segment, start_n, n_k, BLOCK_N, MASKED)
    first, whole, end = _tile_range(start_n, n_k, n_q, window, BLOCK_N, BLOCK_M, WINDOW)
    if MASKED:
        any_real = tl.max(real.to(tl.int32), axis=0)  # a tile of padding has zero gradients, at once
        whole *= any_real
        end *= any_real

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    nothing = _nothing(num_heads)
    if GROUPS == 1 and BLOCK_D <= 128:
        head = key_head
        plane = segment * num_heads + head
        for start_m in range(first, whole, BLOCK_M):
            dk, dv = _dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, delta_ptr, seed_ptr, q_strides, dout_strides, stats_strides,
                q_origin, head, start_m, start_n, n_q, plane, window, qk_scale, p_threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, DROPOUT, False, EXACT, PRECISION,
            )  # fmt: skip
            if EXACT and BLOCK_D > 16:
                k += nothing
                v += nothing
        if whole < end:
            dk, dv = _dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, delta_ptr, seed_ptr, q_strides, dout_strides, stats_strides,
                q_origin, head, whole, start_n, n_q, plane, window, qk_scale, p_threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, DROPOUT, True, EXACT, PRECISION,
            )  # fmt: skip
    else:
        # One loop over all tiles of all heads, every one masked: a loop within a loop, or a peeled tile, would spill.
        tiles = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
        for step in range(GROUPS * tiles):
            head = key_head * GROUPS + step // tiles
            plane = segment * num_heads + head
            dk, dv = _dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, delta_ptr, seed_ptr, q_strides, dout_strides, stats_strides,
                q_origin, head, first + step % tiles * BLOCK_M, start_n, n_q, plane, window, qk_scale, p_threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, DROPOUT, True, EXACT, PRECISION,
            )  # fmt: skip
            if EXACT and BLOCK_D > 16:
                k += nothing
                v += nothing
    if MASKED:
        # A key owns its rows of dK and dV, so padding needs no masking until here.
        dk = tl.where(real[:, None], dk, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D)
    store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D)


__all__ = ["long_backward_dk_dv", "long_backward_dq", "long_forward"]
