"""Long route: FlashAttention-2's loops, for segments of any length.

attn_long_forward        a program holds a tile of queries and loops over the keys: online softmax
attn_long_backward_dq    the same loop for dQ; runs first and leaves δ' for the next kernel
attn_long_backward_dk_dv a program holds a tile of keys and loops over the queries: dK and dV

Each gradient has one writer: there are no atomics, and the same inputs give the same bits. Loops over whole tiles
check no bounds; a ragged last tile is peeled. Tiles outside a window are skipped. Equations and reasons: README.md.
"""

from __future__ import annotations

from ..backend import tl, triton
from .dropout_tile import keep_tile, keep_tile_transposed
from .schedule import locate
from .tile import (
    LOG2E,
    end_of_real_keys,
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
def tile_range(start, rows, others, window, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, WINDOW: tl.constexpr):
    """(first, whole, end): the other side's rows that rows start … start + BLOCK − 1 use.

    first … whole − 1 is a number of whole tiles; whole … end − 1 is the ragged last tile, if there is one.
    """
    first, end = 0, others
    if WINDOW:
        first = tl.maximum(start - window, 0) // BLOCK_OTHER * BLOCK_OTHER
        end = tl.minimum(tl.minimum(start + BLOCK, rows) + window, others)
    whole = tl.minimum(tl.cdiv(end, BLOCK_OTHER), others // BLOCK_OTHER) * BLOCK_OTHER
    return first, whole, end


@triton.jit
def opaque_zero(num_heads):
    """A 0.0 that the compiler cannot fold.

    Adding it to an operand in a loop keeps the operand from being hoisted, which spills in float32 beyond D = 16:
    without matrix instructions a product holds whole rows of both operands in registers.
    """
    return tl.minimum(num_heads, 0).to(tl.float32)


@triton.jit
def long_forward_step(
    acc,  # [BLOCK_M, BLOCK_D] float32
    l,  # [BLOCK_M]
    m,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
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
    FP32: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile of the online softmax: (acc, l, m) after keys start_n … start_n + BLOCK_N − 1."""
    k = load_tile(k_ptr, k_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if CHECK or MASKED or WINDOW:
        real = real_keys(key_mask_ptr, segment, start_n, num_k if MASKED else n_k, BLOCK_N, MASKED)  # [BLOCK_N]
        rows = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = score_mask(real, rows, start_n, window, BLOCK_N, WINDOW)  # [BLOCK_M, BLOCK_N] or [1, BLOCK_N]
        scores = tl.where(mask, scores, float("-inf"))  # [BLOCK_M, BLOCK_N]
    m_new = tl.maximum(m, tl.max(scores, axis=1))  # [BLOCK_M]
    if MASKED or WINDOW:
        # Rows without a real key so far get a finite m, so that m − m_new is not NaN.
        m_new = tl.where(m_new == float("-inf"), -1e30, m_new)  # [BLOCK_M]
    p = softmax_numerator(scores, m_new[:, None], qk_scale, FP32)  # [BLOCK_M, BLOCK_N]
    alpha = tl.exp2((m - m_new) * qk_scale)  # [BLOCK_M]
    l = l * alpha + tl.sum(p, axis=1)  # [BLOCK_M]
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = keep_tile(seed, p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        p = tl.where(keep, p, 0.0)  # [BLOCK_M, BLOCK_N]
    v = load_tile(v_ptr, v_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    return acc, l, m_new


@triton.jit
def attn_long_forward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # [origin, n_k, H_k, D]
    out_ptr,  # [origin, n_q, H, D]
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    cu_seqlens_q_ptr,  # [S + 1] int32; None unless VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32; None unless VARLEN
    slots_ptr,  # [2, num_tiles] int32, attn_schedule_tiles; None unless SCHEDULED
    key_mask_ptr,  # [B, n_k] uint8; None unless MASKED
    seed_ptr,  # [1] int64; None unless DROPOUT
    q_strides,  # (origin, row, head), in elements; so are the others
    k_strides,
    v_strides,
    out_strides,
    stats_strides,  # (m to log₂ l, origin, head)
    num_tiles,  # schedule.locate
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
    SCHEDULED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,  # the tensors are float32
    PRECISION: tl.constexpr,
):
    """O = c (P∘Z) V with P = softmax(scale · QKᵀ), online over key tiles; the statistics (m, log₂ l) of P's rows."""
    segment, head, start_m = locate(
        slots_ptr, num_tiles, cu_seqlens_q_ptr, num_segments, num_heads, num_q, BLOCK_M, VARLEN, SCHEDULED
    )
    plane = segment * num_heads + head
    if VARLEN and segment == num_segments:
        if start_m == 0:
            zero_tail_rows(out_ptr, out_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_m >= n_q:
        return
    qk_scale = scale * LOG2E
    if VARLEN:
        # A segment longer than max_seqlen has rows without a program: return NaN.
        qk_scale = tl.where((n_q > max_q) | (n_k > max_k), float("nan"), qk_scale)
    if MASKED:
        n_k = end_of_real_keys(key_mask_ptr, segment, n_k)

    rows = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # [BLOCK_M, BLOCK_D]
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)  # [BLOCK_M]
    first, whole, end = tile_range(start_m, n_q, n_k, window, BLOCK_M, BLOCK_N, WINDOW)
    zero = opaque_zero(num_heads)
    if MASKED or WINDOW:
        whole = end  # every tile is masked: no peeled tile
    for start_n in range(first, whole, BLOCK_N):
        acc, l, m = long_forward_step(
            acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin, segment, head // GROUPS,
            start_m, start_n, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, MASKED or WINDOW, FP32, PRECISION,
        )  # fmt: skip
        if FP32 and BLOCK_D > 16:
            q += zero
    if not (MASKED or WINDOW) and whole < end:
        acc, l, m = long_forward_step(
            acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin, segment, head // GROUPS,
            start_m, whole, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, True, FP32, PRECISION,
        )  # fmt: skip

    out = acc * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]  # [BLOCK_M, BLOCK_D]
    store_tile(out_ptr, out, out_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D)
    store_statistics(stats_ptr, m, tl.log2(l), stats_strides, q_origin, head, rows, n_q)


@triton.jit
def long_dq_step(
    dq,  # [BLOCK_M, BLOCK_D] float32
    q,  # [BLOCK_M, BLOCK_D]
    dout,  # [BLOCK_M, BLOCK_D]
    m,  # [BLOCK_M]
    log2_l,  # [BLOCK_M]
    delta,  # [BLOCK_M]
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
    FP32: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile: dq + dS K over keys start_n … start_n + BLOCK_N − 1."""
    k = load_tile(k_ptr, k_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr, v_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    p = probabilities(scores, m[:, None], log2_l[:, None], qk_scale, FP32)  # [BLOCK_M, BLOCK_N]
    if CHECK or MASKED or WINDOW:
        # Mask missing keys although K is zero there: their P = exp(0 − L) may be inf.
        real = real_keys(key_mask_ptr, segment, start_n, num_k if MASKED else n_k, BLOCK_N, MASKED)  # [BLOCK_N]
        rows = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = score_mask(real, rows, start_n, window, BLOCK_N, WINDOW)  # [BLOCK_M, BLOCK_N] or [1, BLOCK_N]
        p = tl.where(mask, p, 0.0)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = keep_tile(seed, p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        dp = tl.where(keep, dp, 0.0)  # [BLOCK_M, BLOCK_N]
    ds = p * (dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def attn_long_backward_dq(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # [origin, n_k, H_k, D]
    out_ptr,  # [origin, n_q, H, D]
    dout_ptr,  # [origin, n_q, H, D]
    dq_ptr,  # [origin, n_q, H, D]
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    delta_ptr,  # [origin, H, n_q] float32: δ', written
    cu_seqlens_q_ptr,  # [S + 1] int32; None unless VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32; None unless VARLEN
    slots_ptr,  # [2, num_tiles] int32, attn_schedule_tiles; None unless SCHEDULED
    key_mask_ptr,  # [B, n_k] uint8; None unless MASKED
    seed_ptr,  # [1] int64; None unless DROPOUT
    q_strides,  # (origin, row, head), in elements; so are the others
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    stats_strides,  # (m to log₂ l, origin, head)
    num_tiles,  # schedule.locate
    num_segments,
    num_heads,
    num_q,
    num_k,
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
    SCHEDULED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,  # the tensors are float32
    PRECISION: tl.constexpr,
):
    """dQ = scale · dS K with dS = P ∘ (dP − δ), dP = c Z ∘ (dO Vᵀ) and δ_i = Σ_d O_id dO_id. Writes dQ and δ' = δ / c.

    c multiplies the finished sum: the variables dp, delta and ds are dP, δ and dS divided by c.
    """
    segment, head, start_m = locate(
        slots_ptr, num_tiles, cu_seqlens_q_ptr, num_segments, num_heads, num_q, BLOCK_M, VARLEN, SCHEDULED
    )
    plane = segment * num_heads + head
    if VARLEN and segment == num_segments:
        if start_m == 0:
            zero_tail_rows(dq_ptr, dq_strides, head, cu_seqlens_q_ptr, num_segments, num_q, BLOCK_M, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_m >= n_q:
        return
    qk_scale = scale * LOG2E
    if MASKED:
        n_k = end_of_real_keys(key_mask_ptr, segment, n_k)

    rows = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    out = load_tile(out_ptr, out_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    # [BLOCK_M, BLOCK_D]
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)  # [BLOCK_M], [BLOCK_M]
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1) / keep_scale  # [BLOCK_M]
    delta_ptr += q_origin * stats_strides[1] + head * stats_strides[2]
    tl.store(delta_ptr + rows, delta, mask=rows < n_q)

    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # [BLOCK_M, BLOCK_D]
    first, whole, end = tile_range(start_m, n_q, n_k, window, BLOCK_M, BLOCK_N, WINDOW)
    zero = opaque_zero(num_heads)
    if MASKED or WINDOW:
        whole = end
    for start_n in range(first, whole, BLOCK_N):
        dq = long_dq_step(
            dq, q, dout, m, log2_l, delta, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin,
            segment, head // GROUPS, start_m, start_n, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, MASKED or WINDOW, FP32, PRECISION,
        )  # fmt: skip
        if FP32 and BLOCK_D > 16:
            q += zero
            dout += zero
    if not (MASKED or WINDOW) and whole < end:
        dq = long_dq_step(
            dq, q, dout, m, log2_l, delta, k_ptr, v_ptr, key_mask_ptr, seed_ptr, k_strides, v_strides, k_origin,
            segment, head // GROUPS, start_m, whole, n_k, num_k, plane, window, qk_scale, p_threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, WINDOW, DROPOUT, True, FP32, PRECISION,
        )  # fmt: skip
    store_tile(dq_ptr, dq * (scale * keep_scale), dq_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D)


@triton.jit
def long_dk_dv_step(
    dk,  # [BLOCK_N, BLOCK_D] float32
    dv,  # [BLOCK_N, BLOCK_D] float32
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
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
    FP32: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query tile: (dk + dSᵀ Q, dv + (P∘Z)ᵀ dO) over queries start_m … start_m + BLOCK_M − 1."""
    rows = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, CHECK)  # [BLOCK_M, BLOCK_D]
    # [BLOCK_M, BLOCK_D]
    dout = load_tile(dout_ptr, dout_strides, q_origin, head, start_m, n_q, BLOCK_M, D, BLOCK_D, CHECK)
    m, log2_l = load_statistics(stats_ptr, stats_strides, q_origin, head, rows, n_q)  # [BLOCK_M], [BLOCK_M]
    delta_ptr += q_origin * stats_strides[1] + head * stats_strides[2]
    delta = tl.load(delta_ptr + rows, mask=rows < n_q, other=0.0)  # [BLOCK_M]
    # Pᵀ and dSᵀ are the left factors of their products, so they can be read from registers.
    if FP32:
        # Use the forward's product: another order of summation gives other bits, which scores − m would magnify.
        scores_t = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))  # [BLOCK_N, BLOCK_M]
    else:
        scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p_t = probabilities(scores_t, m[None, :], log2_l[None, :], qk_scale, FP32)  # [BLOCK_N, BLOCK_M]
    if WINDOW:
        keys = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        p_t = tl.where(tl.abs(keys[:, None] - rows[None, :]) <= window, p_t, 0.0)  # [BLOCK_N, BLOCK_M]
    # The dropout mask in P's sign, and the order of dV and dP: as in attn_short_backward.
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = keep_tile_transposed(seed, p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N)  # [BLOCK_N, BLOCK_M]
        p_t = tl.where(keep, p_t, -p_t)  # [BLOCK_N, BLOCK_M]
    if FP32:
        dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p_kept = tl.maximum(p_t, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p_t  # [BLOCK_N, BLOCK_M]
    dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    if not FP32:
        dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if DROPOUT:
        dp_t = tl.where(p_t > 0.0, dp_t, 0.0)  # [BLOCK_N, BLOCK_M]
        p_t = tl.abs(p_t)  # [BLOCK_N, BLOCK_M]
    ds_t = p_t * (dp_t - delta[None, :])  # [BLOCK_N, BLOCK_M]
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit
def attn_long_backward_dk_dv(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # [origin, n_k, H_k, D]
    dout_ptr,  # [origin, n_q, H, D]
    dk_ptr,  # [origin, n_k, H_k, D]
    dv_ptr,  # [origin, n_k, H_k, D]
    stats_ptr,  # [2, origin, H, n_q] float32: m, log₂ l
    delta_ptr,  # [origin, H, n_q] float32: δ'
    cu_seqlens_q_ptr,  # [S + 1] int32; None unless VARLEN
    cu_seqlens_k_ptr,  # [S + 1] int32; None unless VARLEN
    slots_ptr,  # [2, num_tiles] int32, attn_schedule_tiles; None unless SCHEDULED
    key_mask_ptr,  # [B, n_k] uint8; None unless MASKED
    seed_ptr,  # [1] int64; None unless DROPOUT
    q_strides,  # (origin, row, head), in elements; so are the others
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    stats_strides,  # (m to log₂ l, origin, head)
    num_tiles,  # schedule.locate
    num_segments,
    num_heads,
    num_q,
    num_k,
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
    SCHEDULED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    FP32: tl.constexpr,  # the tensors are float32
    PRECISION: tl.constexpr,
):
    """dV = c (P∘Z)ᵀ dO; dK = scale · dSᵀ Q with dS = P ∘ (dP − δ) and dP = c Z ∘ (dO Vᵀ). Reads δ' = δ / c."""
    segment, key_head, start_n = locate(
        slots_ptr, num_tiles, cu_seqlens_k_ptr, num_segments, num_heads // GROUPS, num_k, BLOCK_N, VARLEN, SCHEDULED
    )
    if VARLEN and segment == num_segments:
        if start_n == 0:
            zero_tail_rows(dk_ptr, dk_strides, key_head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
            zero_tail_rows(dv_ptr, dv_strides, key_head, cu_seqlens_k_ptr, num_segments, num_k, BLOCK_N, D, BLOCK_D)
        return
    q_origin, n_q = segment_bounds(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = segment_bounds(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_n >= n_k:
        return
    qk_scale = scale * LOG2E
    k = load_tile(k_ptr, k_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr, v_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    real = real_keys(key_mask_ptr, segment, start_n, n_k, BLOCK_N, MASKED)  # [BLOCK_N]
    first, whole, end = tile_range(start_n, n_k, n_q, window, BLOCK_N, BLOCK_M, WINDOW)
    if MASKED:
        any_real = tl.max(real.to(tl.int32), axis=0)  # 0: the tile is padding, so skip the loop
        whole *= any_real
        end *= any_real

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # [BLOCK_N, BLOCK_D]
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # [BLOCK_N, BLOCK_D]
    zero = opaque_zero(num_heads)
    if GROUPS == 1 and BLOCK_D <= 128:
        head = key_head
        plane = segment * num_heads + head
        for start_m in range(first, whole, BLOCK_M):
            dk, dv = long_dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, delta_ptr, seed_ptr, q_strides, dout_strides, stats_strides,
                q_origin, head, start_m, start_n, n_q, plane, window, qk_scale, p_threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, DROPOUT, False, FP32, PRECISION,
            )  # fmt: skip
            if FP32 and BLOCK_D > 16:
                k += zero
                v += zero
        if whole < end:
            dk, dv = long_dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, delta_ptr, seed_ptr, q_strides, dout_strides, stats_strides,
                q_origin, head, whole, start_n, n_q, plane, window, qk_scale, p_threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, DROPOUT, True, FP32, PRECISION,
            )  # fmt: skip
    else:
        # One loop over the tiles of all heads of the group, all masked: nested loops or a peeled tile would spill.
        tiles = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
        for step in range(GROUPS * tiles):
            head = key_head * GROUPS + step // tiles
            plane = segment * num_heads + head
            dk, dv = long_dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, delta_ptr, seed_ptr, q_strides, dout_strides, stats_strides,
                q_origin, head, first + step % tiles * BLOCK_M, start_n, n_q, plane, window, qk_scale, p_threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, DROPOUT, True, FP32, PRECISION,
            )  # fmt: skip
            if FP32 and BLOCK_D > 16:
                k += zero
                v += zero
    if MASKED:
        # A key affects only its own rows of dK and dV, so masking the padding once, here, is enough.
        dk = tl.where(real[:, None], dk, 0.0)  # [BLOCK_N, BLOCK_D]
        dv = tl.where(real[:, None], dv, 0.0)  # [BLOCK_N, BLOCK_D]
    store_tile(dk_ptr, dk * (scale * keep_scale), dk_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D)
    store_tile(dv_ptr, dv * keep_scale, dv_strides, k_origin, key_head, start_n, n_k, BLOCK_N, D, BLOCK_D)
