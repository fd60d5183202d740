"""Tiles, warps and grid of the kernels for each shape, and their launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import triton
from ..dropout import keep_threshold
from ..row_norm import forward_config
from ..rows import (
    Config,
    as_rows,
    contiguous,
    empty_gradient,
    empty_partials,
    launch_sum_partials,
    num_programs_for,
    row_stride,
)
from .kernels import layernorm_backward, layernorm_forward


def backward_config(hidden_size: int, linear_bias_grad: bool, dropout: bool, dtype: torch.dtype) -> Config:
    """16 elements a thread, beside the sums of dweight and dbias; 8 with dlinear_bias.

    With 16 and dlinear_bias a thread needs 165 registers on sm_90: one program a multiprocessor in place of two.
    """
    columns = max(8, triton.next_power_of_2(hidden_size))
    elements = 2048 if linear_bias_grad else 4096
    if hidden_size > 4096:
        # The float32 sums and a whole row exceed the registers of one program (450 bytes a thread spill at H = 16384):
        # programs share the row. Masks, Philox, float32 or a third sum leave room for 8 elements a thread only.
        crowded = (dropout or hidden_size > 8192) and (hidden_size % 8192 != 0 or dtype.itemsize == 4)
        columns = 4096 if linear_bias_grad or crowded else 8192
    # Two stages of whole rows exceed the shared memory: that of sm_80 in float32, that of sm_86 with dlinear_bias.
    heavy = dtype.itemsize == 4 or (linear_bias_grad and hidden_size > 8192)
    stages = 1 if heavy and hidden_size > columns else 2
    return Config(min(64, max(1, elements // columns)), columns, 8 if hidden_size <= elements else 16, stages)


def empty_forward(x: Tensor, residual: Tensor | None, centred: bool, keep: bool) -> tuple[Tensor, ...]:
    """y, s, mean, rstd, uninitialised. [0] where not kept, for s where it is x itself, for the mean of RMSNorm."""
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if keep and residual is not None else (0,)),
        x.new_empty(rows if keep and centred else (0,), dtype=torch.float32),
        x.new_empty(rows if keep else (0,), dtype=torch.float32),
    )


def empty_backward(
    s: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    separate: bool,
    linear_bias_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    """dx, dresidual, dlinear_bias, dweight, dbias, uninitialised. [0] where not wanted, and where dresidual is dx."""
    return (
        s.new_empty(s.shape),
        s.new_empty(s.shape if separate else (0,)),
        empty_gradient(s, linear_bias, linear_bias_grad),
        empty_gradient(s, weight, weight_grad),
        empty_gradient(s, bias, bias_grad),
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
) -> tuple[Tensor, ...]:
    """`empty_forward`'s tensors, computed. keep: write what the backward needs."""
    y, s, mean, rstd = empty_forward(x, residual, centred, keep)
    if x.numel() == 0:
        return y, s, mean, rstd
    hidden_size = x.shape[-1]
    x_rows = as_rows(x, hidden_size)
    residual_rows = None if residual is None else as_rows(residual, hidden_size)
    num_rows = x_rows.shape[0]
    config = forward_config(hidden_size)
    with torch.cuda.device_of(x):
        layernorm_forward[(triton.cdiv(num_rows, config.rows),)](
            x_rows,
            contiguous(linear_bias),
            residual_rows,
            contiguous(weight),
            contiguous(bias),
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
            BLOCK_M=config.rows,
            BLOCK_H=config.columns,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
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
) -> tuple[Tensor, ...]:
    """`empty_backward`'s tensors, computed. separate: dresidual is not dx, as with dropout."""
    wanted = (linear_bias_grad, weight_grad, bias_grad)
    gradients = empty_backward(s, linear_bias, weight, bias, separate, *wanted)
    dx, dresidual, *sums = gradients
    if s.numel() == 0:
        for total in sums:
            total.zero_()
        return gradients
    hidden_size = s.shape[-1]
    dy_rows, s_rows = as_rows(dy, hidden_size), as_rows(s, hidden_size)
    ds_out_rows = None if ds_out is None else as_rows(ds_out, hidden_size)
    num_rows = s_rows.shape[0]
    config = backward_config(hidden_size, linear_bias_grad, seed is not None, s.dtype)
    blocks = triton.cdiv(hidden_size, config.columns)
    num_tiles = triton.cdiv(num_rows, config.rows)
    # All programs of a row run at the same time, so that L2 serves the blocks that another program has read.
    num_programs = max(1, num_programs_for(s.device, num_tiles * blocks, config.num_warps) // blocks)
    dlinear_bias, dweight, dbias = (empty_partials(num_programs, hidden_size, want, s.device) for want in wanted)
    with torch.cuda.device_of(s):
        layernorm_backward[(num_programs, blocks)](
            dy_rows,
            ds_out_rows,
            s_rows,
            contiguous(weight),
            mean if centred else None,
            rstd,
            seed,
            dx,
            dresidual if separate else None,
            dweight,
            dbias,
            dlinear_bias,
            row_stride(dy_rows),
            row_stride(ds_out_rows),
            row_stride(s_rows),
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            H=hidden_size,
            BLOCK_M=config.rows,
            BLOCK_H=config.columns,
            STAGES=config.stages,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
            # The grid has two programs of 8 warps a multiprocessor, or one of 16, so 128 registers a thread are free.
            # Without this limit ptxas may spill to make room for one program more.
            maxnreg=128,
        )
        launch_sum_partials(list(zip((dlinear_bias, dweight, dbias), sums, strict=True)))
    return gradients
