"""Tile helpers of attention's kernels: segment bounds, loads and stores, score masks, softmax with saved statistics.

Kernels address a tensor by its strides (origin, row, head), in elements. The origin of a segment is its first row on
the packed axis (stride: a row) or its batch index (stride: a sequence). Offsets are 64-bit products: any stride works.
"""

from __future__ import annotations

import math

from ..backend import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def segment_bounds(cu_seqlens_ptr, segment, num_rows, VARLEN: tl.constexpr):
    """(origin, rows) of a segment. num_rows: of each padded sequence, or of the whole packed axis."""
    if VARLEN:
        # Clamp both ends, so that no content of cu_seqlens makes a load leave its tensor or the difference wrap.
        origin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment), 0), num_rows)
        rows = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment + 1), 0), num_rows) - origin
    else:
        origin = segment
        rows = num_rows
    return tl.cast(origin, tl.int64), rows


@triton.jit
def tile_pointers(ptr, strides, origin, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """([BLOCK, BLOCK_D] pointers, [BLOCK] rows counted from ``start``)."""
    ptr += origin * strides[0] + tl.cast(start, tl.int64) * strides[1] + tl.cast(head, tl.int64) * strides[2]
    r = tl.arange(0, BLOCK)  # [BLOCK]
    row_offsets = tl.cast(r, tl.int64) * strides[1]  # [BLOCK]
    return ptr + (row_offsets[:, None] + tl.arange(0, BLOCK_D)[None, :]), r


@triton.jit
def load_tile(
    ptr,
    strides,
    origin,
    head,
    start,
    rows,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Rows start, start + 1, … of a segment of ``rows`` rows: [BLOCK, BLOCK_D], zeros beyond ``rows`` and D.

    CHECK False: the caller guarantees that all BLOCK rows exist.
    """
    pointers, r = tile_pointers(ptr, strides, origin, head, start, BLOCK, BLOCK_D)  # [BLOCK, BLOCK_D], [BLOCK]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if CHECK and D < BLOCK_D:
        return tl.load(pointers, mask=(r[:, None] < rows - start) & (d[None, :] < D), other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=r[:, None] < rows - start, other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers, mask=d[None, :] < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(
    ptr,
    x,  # [BLOCK, BLOCK_D]
    strides,
    origin,
    head,
    start,
    rows,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes x where `load_tile` reads, in the tensor's dtype. Does not write beyond ``rows`` and D."""
    pointers, r = tile_pointers(ptr, strides, origin, head, start, BLOCK, BLOCK_D)  # [BLOCK, BLOCK_D], [BLOCK]
    inside = r[:, None] < rows - start  # [BLOCK, 1]
    if D < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < D)  # [BLOCK, BLOCK_D]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_tail_rows(
    ptr,
    strides,
    head,
    cu_seqlens_ptr,
    num_segments,
    num_rows,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes zeros to the rows of the packed axis after the last segment."""
    origin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + num_segments), 0), num_rows)
    zeros = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)  # [BLOCK, BLOCK_D]
    for start in range(origin, num_rows, BLOCK):
        store_tile(ptr, zeros, strides, tl.cast(0, tl.int64), head, start, num_rows, BLOCK, D, BLOCK_D)


@triton.jit
def real_keys(key_mask_ptr, segment, start_n, n_k, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N] booleans: which of the tile's keys, from start_n of the segment, exist and are not padding."""
    keys = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    real = keys < n_k  # [BLOCK_N]
    if MASKED:
        real = real & (tl.load(key_mask_ptr + tl.cast(segment, tl.int64) * n_k + keys, mask=real, other=0) != 0)
    return real


@triton.jit
def end_of_real_keys(key_mask_ptr, segment, n_k):
    """One past the last real key. Padding is mostly at the end, so the loops over keys can stop there."""
    end = 0
    for start_n in range(0, n_k, 1024):
        keys = start_n + tl.arange(0, 1024)  # [1024]
        real = real_keys(key_mask_ptr, segment, start_n, n_k, 1024, True)  # [1024]
        end = tl.maximum(end, tl.max(tl.where(real, keys + 1, 0), axis=0))
    return end


@triton.jit
def score_mask(real, rows, start_n, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """[BLOCK_M, BLOCK_N] booleans ([1, BLOCK_N] without a window): where the query of a row may attend to a key.

    real: [BLOCK_N], `real_keys`; rows: [BLOCK_M], the queries' rows within the segment.
    """
    if WINDOW:
        keys = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        return real[None, :] & (tl.abs(rows[:, None] - keys[None, :]) <= window)
    else:
        return real[None, :]


@triton.jit
def softmax_numerator(scores, m, qk_scale, FP32: tl.constexpr):
    """exp2(qk_scale (scores − m)); m broadcasts over the keys.

    One fused multiply-add rounds at the magnitude of qk_scale · m, which 16-bit inputs hide. In float32 subtract first:
    near the maximum, where the weight is, the difference is exact.
    """
    if FP32:
        return tl.exp2((scores - m) * qk_scale)
    else:
        return tl.exp2(scores * qk_scale - m * qk_scale)


@triton.jit
def probabilities(scores, m, log2_l, qk_scale, FP32: tl.constexpr):
    """P recomputed from the forward's row statistics: exp2(qk_scale (scores − m) − log2_l)."""
    if FP32:
        return tl.exp2((scores - m) * qk_scale - log2_l)
    else:
        return tl.exp2(scores * qk_scale - (m * qk_scale + log2_l))


@triton.jit
def load_statistics(stats_ptr, stats_strides, origin, head, rows, n_q):
    """(m, log₂ l) of rows, each [BLOCK_M]. Rows that do not exist get l = ∞, so that their P is 0."""
    pointers = stats_ptr + origin * stats_strides[1] + tl.cast(head, tl.int64) * stats_strides[2] + rows  # [BLOCK_M]
    m = tl.load(pointers, mask=rows < n_q, other=0.0)  # [BLOCK_M]
    return m, tl.load(pointers + stats_strides[0], mask=rows < n_q, other=float("inf"))


@triton.jit
def store_statistics(stats_ptr, m, log2_l, stats_strides, origin, head, rows, n_q):
    """Writes (m, log₂ l), each [BLOCK_M], of the rows that exist."""
    pointers = stats_ptr + origin * stats_strides[1] + tl.cast(head, tl.int64) * stats_strides[2] + rows  # [BLOCK_M]
    tl.store(pointers, m, mask=rows < n_q)
    tl.store(pointers + stats_strides[0], log2_l, mask=rows < n_q)
