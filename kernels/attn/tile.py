"""What attention's kernels share: where a segment lies, how a tile of it is read and written, who may see whom.

A tensor is addressed by its strides (origin, row, head), in elements: from one segment's origin to the next, from row
to row, from head to head. The origin of a segment is a token of the packed axis, whose stride is then the row's, or a
batch index. Row and head offsets are 64-bit products: a stride may be anything.

A tile's BLOCK rows are one head's, or BLOCK / HEADS rows of each of HEADS consecutive heads, one head after the other.
"""

from __future__ import annotations

import math

from ..backend import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def segment_bounds(cu_seqlens_ptr, segment, num_rows, VARLEN: tl.constexpr):
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
def tile_rows(BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """(row within its segment, head counted from the tile's first): [BLOCK] each, the head 0 where there is one."""
    r = tl.arange(0, BLOCK)
    if HEADS == 1:
        return r, 0
    else:
        return r % (BLOCK // HEADS), r // (BLOCK // HEADS)


@triton.jit
def _pointers(ptr, strides, origin, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr):
    """([BLOCK, BLOCK_D] pointers, [BLOCK] rows from ``start``)."""
    ptr += origin * strides[0] + tl.cast(start, tl.int64) * strides[1] + tl.cast(head, tl.int64) * strides[2]
    r, h = tile_rows(BLOCK, HEADS)
    of_row = tl.cast(r, tl.int64) * strides[1]
    if HEADS > 1:
        of_row += tl.cast(h, tl.int64) * strides[2]
    return ptr + (of_row[:, None] + tl.arange(0, BLOCK_D)[None, :]), r


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
    HEADS: tl.constexpr = 1,
):
    """Rows start … of a segment of ``rows`` rows, heads head …: [BLOCK, BLOCK_D], zeros beyond rows and D.

    CHECK False promises that all BLOCK rows exist.
    """
    pointers, r = _pointers(ptr, strides, origin, head, start, BLOCK, BLOCK_D, HEADS)
    d = tl.arange(0, BLOCK_D)
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
    x,
    strides,
    origin,
    head,
    start,
    rows,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr = 1,
):
    """Write [BLOCK, BLOCK_D] where `load_tile` reads, in the tensor's dtype, leaving what lies beyond rows and D."""
    pointers, r = _pointers(ptr, strides, origin, head, start, BLOCK, BLOCK_D, HEADS)
    inside = r[:, None] < rows - start
    if D < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_rest(
    ptr,
    strides,
    head,
    cu_seqlens_ptr,
    num_segments,
    num_rows,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr = 1,
):
    """Zeros in the packed axis' rows behind the last segment: nobody's, and defined all the same."""
    origin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + num_segments), 0), num_rows)
    zeros = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(origin, num_rows, BLOCK // HEADS):
        store_tile(ptr, zeros, strides, tl.cast(0, tl.int64), head, start, num_rows, BLOCK, D, BLOCK_D, HEADS)


@triton.jit
def real_keys(
    key_mask_ptr, segment, start_n, n_k, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr = 1
):
    """[BLOCK_N] booleans: the tile's keys, from start_n of the segment, that exist and are not padding."""
    keys = start_n + tile_rows(BLOCK_N, HEADS)[0]
    real = keys < n_k
    if MASKED:
        real = real & (tl.load(key_mask_ptr + tl.cast(segment, tl.int64) * n_k + keys, mask=real, other=0) != 0)
    return real


@triton.jit
def last_real_key(key_mask_ptr, segment, n_k):
    """One past the last real key: tiles of padding at the end, which is where padding is, cost nothing."""
    last = 0
    for start_n in range(0, n_k, 1024):
        keys = start_n + tl.arange(0, 1024)
        real = real_keys(key_mask_ptr, segment, start_n, n_k, 1024, True)
        last = tl.maximum(last, tl.max(tl.where(real, keys + 1, 0), axis=0))
    return last


@triton.jit
def visible(real, rows, start_n, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """[rows, BLOCK_N] (or [1, BLOCK_N]) booleans: who may attend to whom."""
    if WINDOW:
        keys = start_n + tl.arange(0, BLOCK_N)
        return real[None, :] & (tl.abs(rows[:, None] - keys[None, :]) <= window)
    else:
        return real[None, :]


@triton.jit
def softmax_numerator(scores, m, qk_scale, EXACT: tl.constexpr):
    """exp2(qk_scale (scores − m)), m broadcast over the keys.

    One fused multiply-add rounds at the size of qk_scale · m, which 16-bit inputs cannot tell; for float32 (EXACT)
    the difference is taken first: near the maximum, where it counts, it has no rounding at all.
    """
    if EXACT:
        return tl.exp2((scores - m) * qk_scale)
    else:
        return tl.exp2(scores * qk_scale - m * qk_scale)


@triton.jit
def probabilities(scores, m, log2_l, qk_scale, EXACT: tl.constexpr):
    """P again from the forward's row statistics: exp2(qk_scale (scores − m) − log2_l)."""
    if EXACT:
        return tl.exp2((scores - m) * qk_scale - log2_l)
    else:
        return tl.exp2(scores * qk_scale - (m * qk_scale + log2_l))


@triton.jit
def load_statistics(stats_ptr, stats_strides, origin, head, rows, n_q):
    """(m, log₂ l) of rows; one that does not exist has l = ∞, so its P is 0."""
    pointers = stats_ptr + origin * stats_strides[1] + tl.cast(head, tl.int64) * stats_strides[2] + rows
    m = tl.load(pointers, mask=rows < n_q, other=0.0)
    return m, tl.load(pointers + stats_strides[0], mask=rows < n_q, other=float("inf"))


@triton.jit
def store_statistics(stats_ptr, m, log2_l, stats_strides, origin, head, rows, n_q):
    pointers = stats_ptr + origin * stats_strides[1] + tl.cast(head, tl.int64) * stats_strides[2] + rows
    tl.store(pointers, m, mask=rows < n_q)
    tl.store(pointers + stats_strides[0], log2_l, mask=rows < n_q)


__all__ = [
    "LOG2E",
    "last_real_key",
    "load_statistics",
    "load_tile",
    "probabilities",
    "real_keys",
    "segment_bounds",
    "softmax_numerator",
    "store_statistics",
    "store_tile",
    "tile_rows",
    "visible",
    "zero_rest",
]
