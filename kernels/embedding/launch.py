"""Tiles, warps and grid of the kernels, their launch, and the sum of token gradients by id."""

from __future__ import annotations

from collections.abc import Sequence

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
from .kernels import (
    embed_layernorm_backward,
    embed_layernorm_forward,
    embed_layernorm_join_runs,
    embed_layernorm_sum_runs,
)

# Sorted keys that one program adds up. 65k tokens make 6144 programs, three times what an H200 holds at once, and the
# partial sums are a sixteenth of the rows that were read.
CHUNK = 32


def backward_config(hidden_size: int) -> Config:
    """8 elements a thread, half of LayerNorm's backward.

    The rows of three tables are in flight too: with 16 elements the registers allow one program a multiprocessor, and
    the grid needs two.
    """
    columns = max(8, triton.next_power_of_2(hidden_size))
    # Two stages of 16384 float32 columns exceed the shared memory of every GPU, of 8192 columns that of most.
    stages = 2 if columns <= 4096 else 1
    return Config(min(64, max(1, 2048 // columns)), columns, 8 if columns <= 2048 else 16, stages)


def empty_forward(input_ids: Tensor, word_weight: Tensor, out_dtype: torch.dtype, keep: bool) -> tuple[Tensor, ...]:
    """y, mean, rstd, uninitialised. [0] where not kept."""
    kept_shape = input_ids.shape if keep else (0,)
    return (
        word_weight.new_empty((*input_ids.shape, word_weight.shape[1]), dtype=out_dtype),
        word_weight.new_empty(kept_shape, dtype=torch.float32),
        word_weight.new_empty(kept_shape, dtype=torch.float32),
    )


def empty_backward(parameters: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """dword, dtoken_type, dposition, dweight, dbias, uninitialised. [0] where not wanted."""
    word_weight = parameters[0]
    assert word_weight is not None
    return tuple(
        empty_gradient(word_weight, parameter, want) for parameter, want in zip(parameters, wanted, strict=True)
    )


def launch_forward(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    token_type_weight: Tensor,
    position_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, ...]:
    """`empty_forward`'s tensors, computed. keep: write the statistics for the backward."""
    y, mean, rstd = empty_forward(input_ids, word_weight, out_dtype, keep)
    if y.numel() == 0:
        return y, mean, rstd
    hidden_size, num_rows = word_weight.shape[1], input_ids.numel()
    config = forward_config(hidden_size)
    with torch.cuda.device_of(input_ids):
        embed_layernorm_forward[(triton.cdiv(num_rows, config.rows),)](
            input_ids.contiguous(),
            token_type_ids.contiguous(),
            position_ids.contiguous(),
            word_weight.contiguous(),
            token_type_weight.contiguous(),
            position_weight.contiguous(),
            contiguous(norm_weight),
            contiguous(norm_bias),
            seed,
            y,
            mean if keep else None,
            rstd if keep else None,
            word_weight.shape[0],
            token_type_weight.shape[0],
            position_weight.shape[0],
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            eps,
            H=hidden_size,
            BLOCK_M=config.rows,
            BLOCK_H=config.columns,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return y, mean, rstd


def launch_backward(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    token_type_weight: Tensor,
    position_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    padding_idx: int | None,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    """`empty_backward`'s tensors, computed. wanted: whether each of the five parameters needs its gradient."""
    tables = (word_weight, token_type_weight, position_weight)
    gradients = empty_backward((*tables, norm_weight, norm_bias), wanted)
    dtables, (dweight, dbias) = gradients[:3], gradients[3:]
    for dtable in dtables:
        dtable.zero_()
    if dy.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return gradients
    device, hidden_size, num_rows = dy.device, word_weight.shape[1], input_ids.numel()
    dy_rows = as_rows(dy, hidden_size)
    tables_wanted = wanted[:3]
    ds = word_weight.new_empty((num_rows, hidden_size)) if any(tables_wanted) else None
    keys = torch.empty((sum(tables_wanted), num_rows), dtype=torch.int32, device=device)
    keys_by_table = iter(keys)
    config = backward_config(hidden_size)
    num_programs = num_programs_for(device, triton.cdiv(num_rows, config.rows), config.num_warps)
    dweight_partial, dbias_partial = (empty_partials(num_programs, hidden_size, want, device) for want in wanted[3:])
    table_sizes = [table.shape[0] for table in tables]
    with torch.cuda.device_of(dy):
        embed_layernorm_backward[(num_programs,)](
            dy_rows,
            input_ids.contiguous(),
            token_type_ids.contiguous(),
            position_ids.contiguous(),
            *(table.contiguous() for table in tables),
            contiguous(norm_weight),
            mean,
            rstd,
            seed,
            ds,
            *(next(keys_by_table) if want else None for want in tables_wanted),
            dweight_partial,
            dbias_partial,
            row_stride(dy_rows),
            *table_sizes,
            -1 if padding_idx is None else padding_idx,
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            H=hidden_size,
            BLOCK_M=config.rows,
            BLOCK_H=config.columns,
            STAGES=config.stages,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
        launch_sum_partials([(dweight_partial, dweight), (dbias_partial, dbias)])
        if ds is not None:
            sum_by_key(ds, keys, dtables, table_sizes)
    return gradients


def sum_by_key(
    ds: Tensor, keys: Tensor, dtables: Sequence[Tensor], table_sizes: Sequence[int], chunk: int = CHUNK
) -> None:
    """Add up the rows of ds by key into the tables' gradients.

    Args:
        ds: [T, H].
        keys: int32 [tables with a gradient, T], row numbers in the three tables laid end to end.
        dtables: [rows, H] each, zeros; [0] for a table without a gradient.
        table_sizes: rows of the three tables.
        chunk: sorted keys for each program.
    """
    num_rows, hidden_size = ds.shape
    sorted_keys, order = torch.sort(keys.view(-1), stable=True)
    num_keys = sorted_keys.numel()
    num_chunks = triton.cdiv(num_keys, chunk)
    partial = torch.empty((num_chunks, 2, hidden_size), dtype=torch.float32, device=ds.device)
    block_h, block_c = triton.next_power_of_2(hidden_size), 64
    embed_layernorm_sum_runs[(num_chunks,)](
        ds,
        sorted_keys,
        order,
        partial,
        *dtables,
        *table_sizes,
        num_rows,
        num_keys,
        H=hidden_size,
        BLOCK_H=block_h,
        CHUNK=chunk,
        num_warps=min(16, max(1, block_h // 256)),
        enable_fp_fusion=True,
    )
    embed_layernorm_join_runs[(num_chunks, triton.cdiv(hidden_size, block_c))](
        sorted_keys,
        partial,
        *dtables,
        *table_sizes,
        num_keys,
        H=hidden_size,
        CHUNK=chunk,
        BLOCK_P=64,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
