"""Bidirectional attention, forward and backward, for packed segments and for padded batches.

For every segment and head, with S = scale · QKᵀ and Z the dropout mask (0 or 1, P(Z = 1) = 1 − p), c = 1 / (1 − p):

    forward     L_i = log Σ_j exp S_ij        P_ij = exp(S_ij − L_i)        O = c (P∘Z) V
    backward    dV = c (P∘Z)ᵀ dO              dP = c Z ∘ (dO Vᵀ)            δ_i = Σ_j P_ij dP_ij = Σ_d dO_id O_id
                dS = P ∘ (dP − δ)             dQ = scale · dS K             dK = scale · dSᵀ Q

(Vaswani et al. 2017, eq. 1; Dao 2023, "FlashAttention-2", algorithms 1 and 2.) The scores never reach memory: the
forward keeps L, 4 bytes a row, and the backward recomputes P from it. Z is drawn again from the seed. c leaves every
loop: with dP' = Z ∘ (dO Vᵀ) and δ' = δ / c, dS = c P ∘ (dP' − δ'), so c and scale multiply the finished sums.
Exponentials are base 2, with log₂e folded into the scale, because that is the instruction the hardware has.

Two routes, by shape. N rows a segment, D a head, e bytes an element; per segment and head:

    route                 programs over                  FLOPs      bytes through HBM              the floor
    short forward         (segment, head)                 4 N²D      4 NDe + 4 N                    the same
    short backward        (segment, key head)            10 N²D      7 NDe + 4 N                    the same
    long forward          (query tile, segment, head)     4 N²D      4 NDe + 4 N                    the same
    long backward, dQ     (query tile, segment, head)     6 N²D      6 NDe + 8 N }                 10 N²D FLOPs,
    long backward, dK dV  (key tile, segment, key head)   8 N²D      6 NDe + 8 N }                  7 NDe + 4 N

(the long routes read K and V, or Q and dO, once a tile more, from L2.) Short is for segments whose keys fit in one
tile, which BERT's do: the softmax needs no rescaling, and one backward program holds all keys of its head, so it has
whole rows of dP: δ comes from registers (O is neither saved nor read), dQ is finished on the spot, dK and dV stay in
registers until the last query, and nothing is added to memory by two programs. The long backward trades two more
matrix products for the same absence of atomics: every gradient has one owner, so the same inputs give the same bits.
dQ runs first because it holds dO and O: it leaves δ' behind for dK and dV, which saves a pass of its own over both.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._triton import tl, triton
from .backend import choose_backend
from .dropout import dropout_keep, dropout_mask, keep_threshold, resolve_seed

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
MAX_HEAD_DIM = 256


# ---------------------------------------------------------------------------------------------------- shared by kernels
#
# A tensor is addressed by three strides, in elements: _s from one segment's origin to the next, _n from row to row,
# _h from head to head. The origin of a segment is a token of the packed axis (then _s equals _n) or a batch index.


@triton.jit
def _segment(cu_seqlens_ptr, segment, num_rows, VARLEN: tl.constexpr):
    """(origin, rows) of a segment. num_rows: of each padded sequence, or of the whole packed axis."""
    if VARLEN:
        # Clamped, so that no content of cu_seqlens can send a load outside its tensor.
        origin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment), 0), num_rows)
        rows = tl.minimum(tl.load(cu_seqlens_ptr + segment + 1), num_rows) - origin
    else:
        origin = segment
        rows = num_rows
    return tl.cast(origin, tl.int64), rows


@triton.jit
def _last_real_key(key_mask_ptr, num_keys):
    """One past the last real key: tiles of padding at the end, which is where padding is, cost nothing."""
    last = 0
    for start in range(0, num_keys, 1024):
        keys = start + tl.arange(0, 1024)
        real = tl.load(key_mask_ptr + keys, mask=keys < num_keys, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(real, keys + 1, 0), axis=0))
    return last


@triton.jit
def _load_tile(ptr, stride_n, rows_left, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """[BLOCK, BLOCK_D] from ptr, zeros beyond rows_left and D. CHECK False: all BLOCK rows exist."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = ptr + (rows[:, None] * stride_n + columns[None, :])
    if CHECK and D < BLOCK_D:
        return tl.load(pointers, mask=(rows[:, None] < rows_left) & (columns[None, :] < D), other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=rows[:, None] < rows_left, other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(ptr, x, stride_n, rows_left, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = ptr + (rows[:, None] * stride_n + columns[None, :])
    inside = rows[:, None] < rows_left
    if D < BLOCK_D:
        inside = inside & (columns[None, :] < D)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _real_keys(key_mask_ptr, start_n, num_keys, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N] booleans: key start_n + j exists and is not padding."""
    keys = start_n + tl.arange(0, BLOCK_N)
    real = keys < num_keys
    if MASKED:
        real = real & (tl.load(key_mask_ptr + keys, mask=real, other=0) != 0)
    return real


# --------------------------------------------------------------------------------------------------------- short route


@triton.jit
def _short_forward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    out_ptr,  # as q
    lse_ptr,  # [origin, H, n_q] float32
    cu_seqlens_q_ptr,  # [S + 1] int32, VARLEN
    cu_seqlens_k_ptr,
    key_mask_ptr,  # [B, n_k] uint8, MASKED
    seed_ptr,  # [1] int64, DROPOUT
    stride_qs,
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_vs,
    stride_vn,
    stride_vh,
    stride_os,
    stride_on,
    stride_oh,
    stride_ls,
    stride_lh,
    num_heads,
    num_q,
    num_k,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    segment, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    q_origin, n_q = _segment(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = _segment(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if n_q <= 0:
        return
    q = _load_tile(q_ptr + q_origin * stride_qs + head * stride_qh, stride_qn, n_q, BLOCK_M, D, BLOCK_D, True)
    key_head = head // GROUPS
    k = _load_tile(k_ptr + k_origin * stride_ks + key_head * stride_kh, stride_kn, n_k, BLOCK_N, D, BLOCK_D, True)
    v = _load_tile(v_ptr + k_origin * stride_vs + key_head * stride_vh, stride_vn, n_k, BLOCK_N, D, BLOCK_D, True)

    qk_scale = scale * LOG2E
    # A segment longer than the caller's max_seqlen would be cut off: make that NaN, which is noticed.
    qk_scale = tl.where((n_q > BLOCK_M) | (n_k > BLOCK_N), float("nan"), qk_scale)
    if MASKED:
        key_mask_ptr += tl.cast(segment, tl.int64) * num_k
    real = _real_keys(key_mask_ptr, 0, n_k, BLOCK_N, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
    scores = tl.where(real[None, :], scores, float("-inf"))
    m = tl.max(scores, axis=1)
    m = tl.where(m == float("-inf"), 0.0, m)  # no real key: exp2(−inf − 0) = 0, where −inf − −inf would be NaN
    p = tl.exp2(scores - m[:, None])
    l = tl.sum(p, axis=1)
    if DROPOUT:
        rows = tl.arange(0, BLOCK_M)
        keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, 0, tl.program_id(0), BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out = out * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    _store_tile(out_ptr + q_origin * stride_os + head * stride_oh, out, stride_on, n_q, BLOCK_M, D, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    lse = (m + tl.log2(l)) * LN2
    tl.store(lse_ptr + q_origin * stride_ls + head * stride_lh + rows, lse, mask=rows < n_q)


@triton.jit
def _short_backward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    dout_ptr,  # as q
    dq_ptr,  # as q
    dk_ptr,  # as k
    dv_ptr,  # as k
    lse_ptr,  # [origin, H, n_q] float32
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_mask_ptr,
    seed_ptr,
    stride_qs,
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_vs,
    stride_vn,
    stride_vh,
    stride_dos,
    stride_don,
    stride_doh,
    stride_dqs,
    stride_dqn,
    stride_dqh,
    stride_dks,
    stride_dkn,
    stride_dkh,
    stride_ls,
    stride_lh,
    num_heads,
    num_q,
    num_k,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_key_heads = num_heads // GROUPS
    segment, key_head = tl.program_id(0) // num_key_heads, tl.program_id(0) % num_key_heads
    q_origin, n_q = _segment(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = _segment(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if (n_q <= 0) & (n_k <= 0):
        return
    k = _load_tile(k_ptr + k_origin * stride_ks + key_head * stride_kh, stride_kn, n_k, BLOCK_N, D, BLOCK_D, True)
    v = _load_tile(v_ptr + k_origin * stride_vs + key_head * stride_vh, stride_vn, n_k, BLOCK_N, D, BLOCK_D, True)
    if MASKED:
        key_mask_ptr += tl.cast(segment, tl.int64) * num_k
    real = _real_keys(key_mask_ptr, 0, n_k, BLOCK_N, MASKED)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    qk_scale = scale * LOG2E

    for group in range(GROUPS):
        head = key_head * GROUPS + group
        q_base = q_ptr + q_origin * stride_qs + head * stride_qh
        dout_base = dout_ptr + q_origin * stride_dos + head * stride_doh
        dq_base = dq_ptr + q_origin * stride_dqs + head * stride_dqh
        lse_base = lse_ptr + q_origin * stride_ls + head * stride_lh
        # Fewer query rows a step than keys: the [rows, keys] tiles P and dP are what fills the registers.
        for start_m in range(0, n_q, BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            q = _load_tile(q_base + tl.cast(start_m, tl.int64) * stride_qn, stride_qn, n_q - start_m, BLOCK_M, D, BLOCK_D, True)
            dout = _load_tile(
                dout_base + tl.cast(start_m, tl.int64) * stride_don, stride_don, n_q - start_m, BLOCK_M, D, BLOCK_D, True
            )
            # A row that does not exist has L = +inf: its P is 0.
            lse = tl.load(lse_base + rows, mask=rows < n_q, other=float("inf")) * LOG2E
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.where(real[None, :], tl.exp2(scores * qk_scale - lse[:, None]), 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            p_kept = p
            if DROPOUT:
                plane = segment * num_heads + head
                keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, 0, plane, BLOCK_M, BLOCK_N)
                p_kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp, 0.0)
            dv = tl.dot(tl.trans(p_kept.to(dout.dtype)), dout, dv, input_precision=PRECISION)
            delta = tl.sum(p * dp, axis=1)
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            dq = tl.dot(ds, k, input_precision=PRECISION) * (scale * keep_scale)
            _store_tile(dq_base + tl.cast(start_m, tl.int64) * stride_dqn, dq, stride_dqn, n_q - start_m, BLOCK_M, D, BLOCK_D)

    kv_base = k_origin * stride_dks + key_head * stride_dkh
    _store_tile(dk_ptr + kv_base, dk * (scale * keep_scale), stride_dkn, n_k, BLOCK_N, D, BLOCK_D)
    _store_tile(dv_ptr + kv_base, dv * keep_scale, stride_dkn, n_k, BLOCK_N, D, BLOCK_D)


# ---------------------------------------------------------------------------------------------------------- long route


@triton.jit
def _long_forward_step(
    acc,
    l,
    m,
    q,
    k_base,
    v_base,
    key_mask_ptr,
    seed_ptr,
    stride_kn,
    stride_vn,
    start_m,
    start_n,
    n_k,
    plane,
    qk_scale,
    p_threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile of the online softmax: (acc, l, m) after keys start_n … start_n + BLOCK_N − 1."""
    k = _load_tile(k_base + tl.cast(start_n, tl.int64) * stride_kn, stride_kn, n_k - start_n, BLOCK_N, D, BLOCK_D, CHECK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CHECK or MASKED:
        real = _real_keys(key_mask_ptr, start_n, n_k, BLOCK_N, MASKED)
        scores = tl.where(real[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1) * qk_scale)
    if MASKED:
        m_new = tl.where(m_new == float("-inf"), -1e30, m_new)  # no real key so far: finite, so that no NaN arises
    p = tl.exp2(scores * qk_scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, axis=1)
    if DROPOUT:
        rows = start_m + tl.arange(0, BLOCK_M)
        keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, start_n, plane, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    v = _load_tile(v_base + tl.cast(start_n, tl.int64) * stride_vn, stride_vn, n_k - start_n, BLOCK_N, D, BLOCK_D, CHECK)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l, m_new


@triton.jit
def _long_forward(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    out_ptr,  # as q
    lse_ptr,  # [origin, H, n_q] float32
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_mask_ptr,
    seed_ptr,
    stride_qs,
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_vs,
    stride_vn,
    stride_vh,
    stride_os,
    stride_on,
    stride_oh,
    stride_ls,
    stride_lh,
    num_tiles,
    num_heads,
    num_q,
    num_k,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Query tiles of one head run side by side, so that its K and V are read from L2.
    start_m = tl.program_id(0) % num_tiles * BLOCK_M
    plane = tl.program_id(0) // num_tiles
    segment, head = plane // num_heads, plane % num_heads
    q_origin, n_q = _segment(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = _segment(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_m >= n_q:
        return
    # A segment longer than the caller's max_seqlen has rows that no program owns: make that NaN, which is noticed.
    qk_scale = tl.where(n_q > num_tiles * BLOCK_M, float("nan"), scale * LOG2E)
    if MASKED:
        key_mask_ptr += tl.cast(segment, tl.int64) * num_k
        n_k = _last_real_key(key_mask_ptr, n_k)

    q_base = q_ptr + (q_origin * stride_qs + tl.cast(start_m, tl.int64) * stride_qn + head * stride_qh)
    q = _load_tile(q_base, stride_qn, n_q - start_m, BLOCK_M, D, BLOCK_D, True)
    k_base = k_ptr + (k_origin * stride_ks + head // GROUPS * stride_kh)
    v_base = v_ptr + (k_origin * stride_vs + head // GROUPS * stride_vh)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)

    # The ragged last tile is peeled, so that the loop checks no bounds.
    whole = n_k // BLOCK_N * BLOCK_N
    for start_n in range(0, whole, BLOCK_N):
        acc, l, m = _long_forward_step(
            acc, l, m, q, k_base, v_base, key_mask_ptr, seed_ptr, stride_kn, stride_vn, start_m, start_n, n_k, plane,
            qk_scale, p_threshold, D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, DROPOUT, False, PRECISION,
        )  # fmt: skip
    if whole < n_k:
        acc, l, m = _long_forward_step(
            acc, l, m, q, k_base, v_base, key_mask_ptr, seed_ptr, stride_kn, stride_vn, start_m, whole, n_k, plane,
            qk_scale, p_threshold, D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, DROPOUT, True, PRECISION,
        )  # fmt: skip

    out = acc * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    out_base = out_ptr + (q_origin * stride_os + tl.cast(start_m, tl.int64) * stride_on + head * stride_oh)
    _store_tile(out_base, out, stride_on, n_q - start_m, BLOCK_M, D, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    lse = (m + tl.log2(l)) * LN2
    tl.store(lse_ptr + q_origin * stride_ls + head * stride_lh + rows, lse, mask=rows < n_q)


@triton.jit
def _long_dq_step(
    dq,
    q,
    dout,
    lse,
    delta,
    k_base,
    v_base,
    key_mask_ptr,
    seed_ptr,
    stride_kn,
    stride_vn,
    start_m,
    start_n,
    n_k,
    plane,
    qk_scale,
    p_threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq + dS K over keys start_n … start_n + BLOCK_N − 1."""
    k = _load_tile(k_base + tl.cast(start_n, tl.int64) * stride_kn, stride_kn, n_k - start_n, BLOCK_N, D, BLOCK_D, CHECK)
    v = _load_tile(v_base + tl.cast(start_n, tl.int64) * stride_vn, stride_vn, n_k - start_n, BLOCK_N, D, BLOCK_D, CHECK)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - lse[:, None])
    if CHECK or MASKED:
        # Needed although such a key's K and V are zeros here: exp2(0 − L) may be inf.
        p = tl.where(_real_keys(key_mask_ptr, start_n, n_k, BLOCK_N, MASKED)[None, :], p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        rows = start_m + tl.arange(0, BLOCK_M)
        dp = tl.where(dropout_keep(tl.load(seed_ptr), p_threshold, rows, start_n, plane, BLOCK_M, BLOCK_N), dp, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _long_backward_dq(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    out_ptr,  # as q
    dout_ptr,  # as q
    dq_ptr,  # as q
    lse_ptr,  # [origin, H, n_q] float32
    delta_ptr,  # as lse, written
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_mask_ptr,
    seed_ptr,
    stride_qs,
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_vs,
    stride_vn,
    stride_vh,
    stride_os,
    stride_on,
    stride_oh,
    stride_dos,
    stride_don,
    stride_doh,
    stride_dqs,
    stride_dqn,
    stride_dqh,
    stride_ls,
    stride_lh,
    num_tiles,
    num_heads,
    num_q,
    num_k,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start_m = tl.program_id(0) % num_tiles * BLOCK_M
    plane = tl.program_id(0) // num_tiles
    segment, head = plane // num_heads, plane % num_heads
    q_origin, n_q = _segment(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = _segment(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_m >= n_q:
        return
    qk_scale = scale * LOG2E
    if MASKED:
        key_mask_ptr += tl.cast(segment, tl.int64) * num_k
        n_k = _last_real_key(key_mask_ptr, n_k)

    start = tl.cast(start_m, tl.int64)
    rows_left = n_q - start_m
    q_base = q_ptr + (q_origin * stride_qs + start * stride_qn + head * stride_qh)
    out_base = out_ptr + (q_origin * stride_os + start * stride_on + head * stride_oh)
    dout_base = dout_ptr + (q_origin * stride_dos + start * stride_don + head * stride_doh)
    q = _load_tile(q_base, stride_qn, rows_left, BLOCK_M, D, BLOCK_D, True)
    out = _load_tile(out_base, stride_on, rows_left, BLOCK_M, D, BLOCK_D, True)
    dout = _load_tile(dout_base, stride_don, rows_left, BLOCK_M, D, BLOCK_D, True)
    rows = start_m + tl.arange(0, BLOCK_M)
    row_base = q_origin * stride_ls + head * stride_lh
    lse = tl.load(lse_ptr + row_base + rows, mask=rows < n_q, other=float("inf")) * LOG2E
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1) / keep_scale
    tl.store(delta_ptr + row_base + rows, delta, mask=rows < n_q)

    k_base = k_ptr + (k_origin * stride_ks + head // GROUPS * stride_kh)
    v_base = v_ptr + (k_origin * stride_vs + head // GROUPS * stride_vh)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    whole = n_k // BLOCK_N * BLOCK_N
    for start_n in range(0, whole, BLOCK_N):
        dq = _long_dq_step(
            dq, q, dout, lse, delta, k_base, v_base, key_mask_ptr, seed_ptr, stride_kn, stride_vn, start_m, start_n, n_k,
            plane, qk_scale, p_threshold, D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, DROPOUT, False, PRECISION,
        )  # fmt: skip
    if whole < n_k:
        dq = _long_dq_step(
            dq, q, dout, lse, delta, k_base, v_base, key_mask_ptr, seed_ptr, stride_kn, stride_vn, start_m, whole, n_k,
            plane, qk_scale, p_threshold, D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED, DROPOUT, True, PRECISION,
        )  # fmt: skip
    dq_base = dq_ptr + (q_origin * stride_dqs + start * stride_dqn + head * stride_dqh)
    _store_tile(dq_base, dq * (scale * keep_scale), stride_dqn, rows_left, BLOCK_M, D, BLOCK_D)


@triton.jit
def _long_dk_dv_step(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    lse_base,
    delta_base,
    seed_ptr,
    stride_qn,
    stride_don,
    start_m,
    start_n,
    n_q,
    plane,
    qk_scale,
    p_threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dk + dSᵀ Q, dv + (P∘Z)ᵀ dO) over queries start_m … start_m + BLOCK_M − 1."""
    rows = start_m + tl.arange(0, BLOCK_M)
    q = _load_tile(q_base + tl.cast(start_m, tl.int64) * stride_qn, stride_qn, n_q - start_m, BLOCK_M, D, BLOCK_D, CHECK)
    dout = _load_tile(
        dout_base + tl.cast(start_m, tl.int64) * stride_don, stride_don, n_q - start_m, BLOCK_M, D, BLOCK_D, CHECK
    )
    if CHECK:
        lse = tl.load(lse_base + rows, mask=rows < n_q, other=float("inf"))
        delta = tl.load(delta_base + rows, mask=rows < n_q, other=0.0)
    else:
        lse = tl.load(lse_base + rows)
        delta = tl.load(delta_base + rows)
    # Transposed, [keys, queries]: Pᵀ and dSᵀ are then the left factors of their products, straight from registers.
    scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p_t = tl.exp2(scores_t * qk_scale - (lse * LOG2E)[None, :])
    dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    p_kept = p_t
    if DROPOUT:
        keep = tl.trans(dropout_keep(tl.load(seed_ptr), p_threshold, rows, start_n, plane, BLOCK_M, BLOCK_N))
        p_kept = tl.where(keep, p_t, 0.0)
        dp_t = tl.where(keep, dp_t, 0.0)
    dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds_t = p_t * (dp_t - delta[None, :])
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _long_backward_dk_dv(
    q_ptr,  # [origin, n_q, H, D]
    k_ptr,  # [origin, n_k, H_k, D]
    v_ptr,  # as k
    dout_ptr,  # as q
    dk_ptr,  # as k
    dv_ptr,  # as k
    lse_ptr,  # [origin, H, n_q] float32
    delta_ptr,  # as lse
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_mask_ptr,
    seed_ptr,
    stride_qs,
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_vs,
    stride_vn,
    stride_vh,
    stride_dos,
    stride_don,
    stride_doh,
    stride_dks,
    stride_dkn,
    stride_dkh,
    stride_ls,
    stride_lh,
    num_tiles,
    num_heads,
    num_q,
    num_k,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_key_heads = num_heads // GROUPS
    start_n = tl.program_id(0) % num_tiles * BLOCK_N
    plane = tl.program_id(0) // num_tiles
    segment, key_head = plane // num_key_heads, plane % num_key_heads
    q_origin, n_q = _segment(cu_seqlens_q_ptr, segment, num_q, VARLEN)
    k_origin, n_k = _segment(cu_seqlens_k_ptr, segment, num_k, VARLEN)
    if start_n >= n_k:
        return
    qk_scale = scale * LOG2E
    start = tl.cast(start_n, tl.int64)
    keys_left = n_k - start_n
    k_base = k_ptr + (k_origin * stride_ks + start * stride_kn + key_head * stride_kh)
    v_base = v_ptr + (k_origin * stride_vs + start * stride_vn + key_head * stride_vh)
    k = _load_tile(k_base, stride_kn, keys_left, BLOCK_N, D, BLOCK_D, True)
    v = _load_tile(v_base, stride_vn, keys_left, BLOCK_N, D, BLOCK_D, True)
    if MASKED:
        key_mask_ptr += tl.cast(segment, tl.int64) * num_k
    real = _real_keys(key_mask_ptr, start_n, n_k, BLOCK_N, MASKED)
    if MASKED:
        n_q = tl.where(tl.max(real.to(tl.int32), axis=0) > 0, n_q, 0)  # a tile of padding: gradients are zero, at once

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    whole = n_q // BLOCK_M * BLOCK_M
    for group in range(GROUPS):
        head = key_head * GROUPS + group
        plane = segment * num_heads + head
        q_base = q_ptr + (q_origin * stride_qs + head * stride_qh)
        dout_base = dout_ptr + (q_origin * stride_dos + head * stride_doh)
        lse_base = lse_ptr + (q_origin * stride_ls + head * stride_lh)
        delta_base = delta_ptr + (q_origin * stride_ls + head * stride_lh)
        for start_m in range(0, whole, BLOCK_M):
            dk, dv = _long_dk_dv_step(
                dk, dv, k, v, q_base, dout_base, lse_base, delta_base, seed_ptr, stride_qn, stride_don, start_m, start_n,
                n_q, plane, qk_scale, p_threshold, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, False, PRECISION,
            )  # fmt: skip
        if whole < n_q:
            dk, dv = _long_dk_dv_step(
                dk, dv, k, v, q_base, dout_base, lse_base, delta_base, seed_ptr, stride_qn, stride_don, whole, start_n,
                n_q, plane, qk_scale, p_threshold, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, True, PRECISION,
            )  # fmt: skip
    if MASKED:
        # A key owns its rows of dK and dV, so padding needs no masking until here.
        dk = tl.where(real[:, None], dk, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    kv_base = k_origin * stride_dks + start * stride_dkn + key_head * stride_dkh
    _store_tile(dk_ptr + kv_base, dk * (scale * keep_scale), stride_dkn, keys_left, BLOCK_N, D, BLOCK_D)
    _store_tile(dv_ptr + kv_base, dv * keep_scale, stride_dkn, keys_left, BLOCK_N, D, BLOCK_D)
