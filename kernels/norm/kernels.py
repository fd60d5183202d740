"""The kernels of LayerNorm and RMSNorm, alone and after dropout and a residual. README.md has the equations."""

from __future__ import annotations

from ..backend import tl, triton
from ..row_norm import normalise_again, normalise_backward, normalise_forward
from ..rows import row_keep, row_tile


@triton.jit(do_not_specialize=["num_rows", "p_threshold"])
def layernorm_forward(
    x_ptr,  # [M, H]
    linear_bias_ptr,  # [H] or None
    residual_ptr,  # [M, H] or None
    weight_ptr,  # [H] or None
    bias_ptr,  # [H] or None
    seed_ptr,  # [1] int64, or None: no dropout
    y_ptr,  # [M, H] contiguous
    s_ptr,  # [M, H] contiguous, or None: not kept
    mean_ptr,  # [M] float32, or None: not kept
    rstd_ptr,  # [M] float32, or None: not kept
    stride_x,  # elements from row to row, or None: H
    stride_residual,
    num_rows,
    p_threshold,
    keep_scale,
    eps,
    H: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """s = residual + c Z∘(x + linear_bias);  y = weight∘x̂(s) + bias."""
    tile = tl.program_id(0)
    offsets, mask = row_tile(tile, stride_x, num_rows, H, BLOCK_M, BLOCK_H)  # [BLOCK_M, BLOCK_H]
    s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
    columns = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    if linear_bias_ptr is not None:
        s += tl.load(linear_bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        s = tl.where(row_keep(tl.load(seed_ptr), p_threshold, tile, H, BLOCK_M, BLOCK_H), s * keep_scale, 0.0)
    if residual_ptr is not None:
        offsets, mask = row_tile(tile, stride_residual, num_rows, H, BLOCK_M, BLOCK_H)
        s += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Rounded once, so that the backward differentiates the s that is stored.
    s = s.to(y_ptr.dtype.element_ty).to(tl.float32)
    offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
    if s_ptr is not None:
        tl.store(s_ptr + offsets, s.to(s_ptr.dtype.element_ty), mask=mask)

    y, mean, rstd = normalise_forward(s, mask, eps, H, CENTRED)  # [BLOCK_M, BLOCK_H], [BLOCK_M], [BLOCK_M]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "p_threshold"])
def layernorm_backward(
    dy_ptr,  # [M, H]
    ds_out_ptr,  # [M, H] or None: gradient of s as an output
    s_ptr,  # [M, H]
    weight_ptr,  # [H] or None
    mean_ptr,  # [M] float32, or None: RMSNorm, the mean is the constant 0
    rstd_ptr,  # [M] float32
    seed_ptr,  # [1] int64, or None: no dropout
    dx_ptr,  # [M, H] contiguous
    dresidual_ptr,  # [M, H] contiguous, or None: it equals dx
    dweight_ptr,  # [P, H] float32 or None: partial sums, a row for each program
    dbias_ptr,  # [P, H] float32 or None
    dlinear_bias_ptr,  # [P, H] float32 or None
    stride_dy,  # elements from row to row, or None: H
    stride_ds_out,
    stride_s,
    num_rows,
    p_threshold,
    keep_scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx̂ = weight∘dy;  ds = r (dx̂ − ⟨dx̂⟩ − x̂ ⟨dx̂∘x̂⟩) + ds_out;  dresidual = ds;  dx = c Z∘ds; and the column sums.

    A row wider than BLOCK_H is shared by BLOCKS programs, one for each block of columns, along the grid's second axis.
    """
    BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H  # with Triton 3.6 tl.cdiv gives no constant
    first = 0 if BLOCKS == 1 else tl.program_id(1) * BLOCK_H
    columns = first + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_H]
    # Reduced over the tile's rows after the loop: a reduction in the loop would synchronise the warps at each tile.
    dweight = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dlinear_bias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # The grid has one or two programs a multiprocessor, too few to hide the latency of loads: STAGES are in flight.
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H, first)  # [BLOCK_M, BLOCK_H]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
        offsets, mask = row_tile(tile, stride_s, num_rows, H, BLOCK_M, BLOCK_H, first)
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
        mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)  # [BLOCK_M]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)  # [BLOCK_M]

        xhat = normalise_again(s, mean, rstd, H, BLOCK_H, first)  # [BLOCK_M, BLOCK_H]
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        dxhat = dy  # [BLOCK_M, BLOCK_H]
        if weight_ptr is not None:
            dxhat = dy * weight
        if BLOCKS == 1:
            ds = normalise_backward(dxhat, xhat, rstd, H, mean_ptr is not None)  # [BLOCK_M, BLOCK_H]
        else:
            # Σ dx̂ and Σ dx̂∘x̂ over the row's other blocks. Their programs read them at about this time: L2 holds them.
            more = tl.zeros((BLOCK_M,), dtype=tl.float32)
            more_x = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for i in tl.static_range(1, BLOCKS):
                other = (tl.program_id(1) + i) % BLOCKS * BLOCK_H
                offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H, other)
                other_dxhat = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
                if weight_ptr is not None:
                    there = other + tl.arange(0, BLOCK_H)  # [BLOCK_H]
                    other_dxhat *= tl.load(weight_ptr + there, mask=there < H, other=0.0).to(tl.float32)[None, :]
                offsets, mask = row_tile(tile, stride_s, num_rows, H, BLOCK_M, BLOCK_H, other)
                other_s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
                more += tl.sum(other_dxhat, axis=1)
                more_x += tl.sum(other_dxhat * normalise_again(other_s, mean, rstd, H, BLOCK_H, other), axis=1)
            ds = normalise_backward(dxhat, xhat, rstd, H, mean_ptr is not None, more, more_x)
        if ds_out_ptr is not None:
            offsets, mask = row_tile(tile, stride_ds_out, num_rows, H, BLOCK_M, BLOCK_H, first)
            ds += tl.load(ds_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H, first)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dx = ds
        if seed_ptr is not None:
            dx = tl.where(row_keep(seed, p_threshold, tile, H, BLOCK_M, BLOCK_H, first), ds * keep_scale, 0.0)
        if dlinear_bias_ptr is not None:
            dlinear_bias += dx
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0) * H + columns  # [BLOCK_H]
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=columns < H)
    if dlinear_bias_ptr is not None:
        tl.store(dlinear_bias_ptr + partial, tl.sum(dlinear_bias, axis=0), mask=columns < H)
