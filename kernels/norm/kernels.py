"""The kernels behind `layernorm` and `dropout_add_layernorm`, and their launch; the maths is in layernorm.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import tl, triton
from ..dropout import keep_threshold
from ..rows import as_rows, launch_sum_partials, num_programs_for, row_keep, row_stride, row_tile


@triton.jit
def row_statistics(s, mask, eps, H: tl.constexpr, CENTRED: tl.constexpr = True):
    """(x̂, mean, rstd) of rows [BLOCK_M, BLOCK_H]; layernorm.py says why in two passes. Not CENTRED: the mean is 0."""
    if not CENTRED:
        rstd = tl.rsqrt(tl.sum(s * s, axis=1) / H + eps)
        return s * rstd[:, None], rstd * 0.0, rstd
    mean = tl.sum(s, axis=1) / H
    d = tl.where(mask, s - mean[:, None], 0.0)
    mean_d = tl.sum(d, axis=1) / H
    variance = tl.maximum(tl.sum(d * d, axis=1) / H - mean_d * mean_d, 0.0)
    rstd = tl.rsqrt(variance + eps)
    return (d - mean_d[:, None]) * rstd[:, None], mean + mean_d, rstd


@triton.jit
def normalised(s, mean, rstd, H: tl.constexpr, BLOCK_H: tl.constexpr, first_column=0):
    """x̂ again from the forward's statistics."""
    xhat = (s - mean[:, None]) * rstd[:, None]
    if H % BLOCK_H != 0:
        # Beyond H dy is 0, but 0 · x̂ is not where −μ r overflowed.
        xhat = tl.where(first_column + tl.arange(0, BLOCK_H)[None, :] < H, xhat, 0.0)
    return xhat


@triton.jit
def sum_gradient(g, xhat, rstd, H: tl.constexpr, CENTRED: tl.constexpr = True, more_g=None, more_gx=None):
    """ds = r (g − ⟨g⟩ − x̂ ⟨g∘x̂⟩); not CENTRED: without ⟨g⟩. more_g, more_gx: Σg and Σg∘x̂ of the row's other columns."""
    sum_gx = tl.sum(g * xhat, axis=1)
    if more_gx is not None:
        sum_gx += more_gx
    mean_gx = sum_gx / H
    if CENTRED:
        sum_g = tl.sum(g, axis=1)
        if more_g is not None:
            sum_g += more_g
        mean_g = sum_g / H
        return (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
    return (g - xhat * mean_gx[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["num_rows", "p_threshold"])
def _forward(
    x_ptr,  # [M, H]
    linear_bias_ptr,  # [H] or None
    residual_ptr,  # [M, H] or None
    weight_ptr,  # [H] or None
    bias_ptr,  # [H] or None
    seed_ptr,  # [1] int64, or None: no dropout
    y_ptr,  # [M, H] contiguous
    s_ptr,  # as y, or None: not kept
    mean_ptr,  # [M] float32, or None: not kept
    rstd_ptr,  # as mean
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
    tile = tl.program_id(0)
    offsets, mask = row_tile(tile, stride_x, num_rows, H, BLOCK_M, BLOCK_H)
    s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK_H)
    if linear_bias_ptr is not None:
        s += tl.load(linear_bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        s = tl.where(row_keep(tl.load(seed_ptr), p_threshold, tile, H, BLOCK_M, BLOCK_H), s * keep_scale, 0.0)
    if residual_ptr is not None:
        offsets, mask = row_tile(tile, stride_residual, num_rows, H, BLOCK_M, BLOCK_H)
        s += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    s = s.to(y_ptr.dtype.element_ty).to(tl.float32)
    offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
    if s_ptr is not None:
        tl.store(s_ptr + offsets, s.to(s_ptr.dtype.element_ty), mask=mask)

    y, mean, rstd = row_statistics(s, mask, eps, H, CENTRED)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "p_threshold"])
def _backward(
    dy_ptr,  # [M, H]
    ds_out_ptr,  # [M, H] or None: gradient of s as an output
    s_ptr,  # [M, H]
    weight_ptr,  # [H] or None
    mean_ptr,  # [M] float32, or None: 0, and not a function of s
    rstd_ptr,  # [M] float32
    seed_ptr,  # [1] int64, or None: no dropout
    dx_ptr,  # [M, H] contiguous
    dresidual_ptr,  # as dx, or None: it equals dx
    dweight_ptr,  # [P, H] float32 or None: partial sums, a row a program
    dbias_ptr,  # as dweight
    dlinear_bias_ptr,  # as dweight
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
    # A row wider than a block is its column blocks' programs', one on the grid's second axis for each.
    BLOCKS: tl.constexpr = tl.cdiv(H, BLOCK_H)
    first = 0 if BLOCKS == 1 else tl.program_id(1) * BLOCK_H
    columns = first + tl.arange(0, BLOCK_H)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    # Summed over the tile's rows only at the end: until then no thread waits for another.
    dweight = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dlinear_bias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # The few programs that this grid has must keep the memory busy by themselves: STAGES tiles are in flight.
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H, first)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = row_tile(tile, stride_s, num_rows, H, BLOCK_M, BLOCK_H, first)
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)

        xhat = normalised(s, mean, rstd, H, BLOCK_H, first)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        g = dy
        if weight_ptr is not None:
            g = dy * weight
        if BLOCKS == 1:
            ds = sum_gradient(g, xhat, rstd, H, mean_ptr is not None)
        else:
            # The others' columns, of which only ⟨g⟩ and ⟨g∘x̂⟩ are wanted: read by them too, and at about this time.
            more_g = tl.zeros((BLOCK_M,), dtype=tl.float32)
            more_gx = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for i in tl.static_range(1, BLOCKS):
                other = (tl.program_id(1) + i) % BLOCKS * BLOCK_H
                offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H, other)
                g_there = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                if weight_ptr is not None:
                    there = other + tl.arange(0, BLOCK_H)
                    g_there *= tl.load(weight_ptr + there, mask=there < H, other=0.0).to(tl.float32)[None, :]
                offsets, mask = row_tile(tile, stride_s, num_rows, H, BLOCK_M, BLOCK_H, other)
                s_there = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                more_g += tl.sum(g_there, axis=1)
                more_gx += tl.sum(g_there * normalised(s_there, mean, rstd, H, BLOCK_H, other), axis=1)
            ds = sum_gradient(g, xhat, rstd, H, mean_ptr is not None, more_g, more_gx)
        if ds_out_ptr is not None:
            offsets, mask = row_tile(tile, stride_ds_out, num_rows, H, BLOCK_M, BLOCK_H, first)
            ds += tl.load(ds_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H, first)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if seed_ptr is not None:
            ds = tl.where(row_keep(seed, p_threshold, tile, H, BLOCK_M, BLOCK_H, first), ds * keep_scale, 0.0)
        if dlinear_bias_ptr is not None:
            dlinear_bias += ds
        tl.store(dx_ptr + offsets, ds.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0) * H + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=columns < H)
    if dlinear_bias_ptr is not None:
        tl.store(dlinear_bias_ptr + partial, tl.sum(dlinear_bias, axis=0), mask=columns < H)


class Config(NamedTuple):
    """Tile and warps of one kernel."""

    block_m: int
    block_h: int
    num_warps: int


def forward_config(hidden_size: int) -> Config:
    # 32 elements a thread. Up to 1024 columns a row lies in one warp, which reduces it without a barrier; the masked
    # columns of a width such as 768 are then whole registers, and the compiler drops them.
    block_h = max(8, triton.next_power_of_2(hidden_size))  # Philox makes 8 columns a call
    return Config(min(64, max(1, 1024 // block_h)), block_h, min(16, max(1, block_h // 1024)))


def _backward_config(hidden_size: int, linear_bias_grad: bool, dropout: bool, dtype: torch.dtype) -> Config:
    # 16 elements a thread: besides the tile, dweight and dbias have to stay in registers; 8 with dlinear_bias, without
    # which halving a multiprocessor held one program (165 registers a thread on sm_90) in place of two.
    block_h = max(8, triton.next_power_of_2(hidden_size))
    elements = 2048 if linear_bias_grad else 4096
    if hidden_size > 4096:
        # Two or three float32 rows of sums don't fit in the registers beside the row (16384: the kernel spilled 450
        # bytes a thread): programs share it, in halves or, where masks, Philox, float32 or a third sum want registers
        # too, in 8 elements a thread.
        heavy = (dropout or hidden_size > 8192) and (hidden_size % 8192 != 0 or dtype.itemsize == 4)
        block_h = 4096 if linear_bias_grad or heavy else 8192
    return Config(min(64, max(1, elements // block_h)), block_h, 8 if hidden_size <= elements else 16)


def kept_shapes(x: Tensor, residual: Tensor | None, centred: bool, keep: bool) -> tuple[torch.Size, ...]:
    """Shapes of s, mean and rstd: [0] where they are not kept, where s is x itself, and where the mean is 0."""
    nothing, rows = torch.Size([0]), x.shape[:-1]
    return (
        x.shape if keep and residual is not None else nothing,
        rows if keep and centred else nothing,
        rows if keep else nothing,
    )


def launch_forward(
    x: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    centred: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_size = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s_shape, mean_shape, rstd_shape = kept_shapes(x, residual, centred, keep)
    s = torch.empty(s_shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(mean_shape, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rstd_shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, s, mean, rstd
    x_rows = as_rows(x, hidden_size)
    residual_rows = None if residual is None else as_rows(residual, hidden_size)
    num_rows = x_rows.shape[0]
    config = forward_config(hidden_size)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(num_rows, config.block_m),)](
            x_rows,
            None if linear_bias is None else linear_bias.contiguous(),
            residual_rows,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            seed,
            y,
            s if keep and residual is not None else None,
            mean if keep and centred else None,
            rstd if keep else None,
            row_stride(x_rows),
            row_stride(residual_rows),
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            eps,
            H=hidden_size,
            CENTRED=centred,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            num_warps=config.num_warps,
        )
    return y, s, mean, rstd


def launch_backward(
    dy: Tensor,
    ds_out: Tensor | None,
    s: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    centred: bool,
    separate: bool,
    linear_bias_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden_size = s.shape[-1]
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dresidual = torch.empty(s.shape if separate else (0,), dtype=s.dtype, device=s.device)
    dlinear_bias = empty_gradient(s, linear_bias, linear_bias_grad)
    dweight, dbias = empty_gradient(s, weight, weight_grad), empty_gradient(s, bias, bias_grad)
    if s.numel() == 0:
        return dx, dresidual, dlinear_bias.zero_(), dweight.zero_(), dbias.zero_()
    dy_rows, s_rows = as_rows(dy, hidden_size), as_rows(s, hidden_size)
    ds_out_rows = None if ds_out is None else as_rows(ds_out, hidden_size)
    num_rows = s_rows.shape[0]
    config = _backward_config(hidden_size, linear_bias_grad, seed is not None, s.dtype)
    blocks = triton.cdiv(hidden_size, config.block_h)
    num_tiles = triton.cdiv(num_rows, config.block_m)
    # All at once: the programs of a row then find in L2 what one of them has read.
    num_programs = max(1, num_programs_for(s.device, num_tiles * blocks, config.num_warps) // blocks)
    dlinear_bias_partial, dweight_partial, dbias_partial = (
        torch.empty((num_programs, hidden_size), dtype=torch.float32, device=s.device) if wanted else None
        for wanted in (linear_bias_grad, weight_grad, bias_grad)
    )
    with torch.cuda.device_of(s):
        _backward[(num_programs, blocks)](
            dy_rows,
            ds_out_rows,
            s_rows,
            None if weight is None else weight.contiguous(),
            mean if centred else None,
            rstd,
            seed,
            dx,
            dresidual if separate else None,
            dweight_partial,
            dbias_partial,
            dlinear_bias_partial,
            row_stride(dy_rows),
            row_stride(ds_out_rows),
            row_stride(s_rows),
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            H=hidden_size,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            # Whole rows of float32, twice, are more than sm_80 has of shared memory.
            STAGES=2 if blocks == 1 or s.element_size() == 2 else 1,
            num_warps=config.num_warps,
            # The grid is two programs of 8 warps a multiprocessor, or one of 16. Left alone the assembler may spill to
            # make room for one more.
            maxnreg=128,
        )
        launch_sum_partials([(dlinear_bias_partial, dlinear_bias), (dweight_partial, dweight), (dbias_partial, dbias)])
    return dx, dresidual, dlinear_bias, dweight, dbias


def empty_gradient(s: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor:
    """As ``parameter``, or of no element where its gradient is not wanted."""
    if parameter is None or not wanted:
        return torch.empty(0, dtype=s.dtype, device=s.device)
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=s.device)


__all__ = [
    "Config",
    "empty_gradient",
    "forward_config",
    "kept_shapes",
    "launch_backward",
    "launch_forward",
    "normalised",
    "row_statistics",
    "sum_gradient",
]
