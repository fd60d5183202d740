"""BERT's input: word + token type + position embedding, LayerNorm and dropout in one kernel, forward and backward.

Token t has ids i, j, k in the tables W (words), S (token types), P (positions), rows of H elements. Z is the dropout
mask (0 or 1, P(Z = 1) = 1 − p), c = 1 / (1 − p), ⟨·⟩ a mean over the row:

    forward     s = W_i + S_j + P_k         μ = ⟨s⟩        r = (⟨(s − μ)²⟩ + eps)^−½
                x̂ = (s − μ) r               y = c Z∘(w∘x̂ + b)
    backward    dn = c Z∘dy                 dw = Σ_t dn∘x̂  db = Σ_t dn
                g = ds = r (h − ⟨h⟩ − x̂ ⟨h∘x̂⟩), h = w∘dn
                dW_i = Σ g over the tokens whose id is i; dS_j and dP_k likewise; rows of ids that do not occur are 0

(Devlin et al. 2018, figure 2; dropout after the norm, as in BERT's code.) All of it is float32 in registers: s is never
rounded, whatever the tables' dtype, and y once, to ``out_dtype``. The variance is the corrected two-pass one of
`layernorm`.

Kept for the backward: μ and r in float32, 8 bytes a token, and the ids. s is gathered again: a row of W costs the read
that a kept s would cost, and S and P lie in cache. The mask is drawn again from the seed.

The backward sums rows by id without atomics, so that the same inputs give the same bits:
1. `_gradient` writes g [T, H], float32 for float32 tables (else their dtype: PyTorch's rounding), partial sums of dw
   and db a program, and for each token its three rows in the tables laid end to end: 3T keys. A key beyond all
   tables stands for ``padding_idx``.
2. ``torch.sort``, stable: tokens of one id become neighbours, in the order of the text.
3. `_sum_runs`: a program adds up CHUNK neighbours in order. A run of one key that lies in its chunk goes straight to
   the table; what a chunk's edge cuts off goes to float32 partial sums, at most two rows a chunk.
4. `_join_runs`: for a run cut by edges, one program for each 64 columns adds the parts, in the order of the chunks.
However the keys are distributed (two token types are two runs of T/2, [MASK] is an eighth of all words), every program
of step 3 has the same work, and step 4 reads 2/CHUNK of what step 3 did at most.

Bytes through HBM a token at e bytes a table's element and o an output's, without those that H does not multiply (ids,
keys, μ, r: some 200 with the sort). V is the rows of all tables: their gradients are written as zeros, and again where
an id occurs.

                          this file         fewest          PyTorch's operators, with autocast's cast
    forward               (e + o) H         (e + o) H       (13 e + 3 o + 1) H
    backward              (5 e + o) H       (e + o) H       (7 e + 3 o + 1) H
      once a call         eHV to 2 eHV      eHV             eHV to 2 eHV

At e = 4, o = 2, H = 768: 4.6 kB forward against 45, 17 kB backward against 27. What the backward moves beyond the
fewest, g written once and read once a table, is the price of a fixed order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..backend import KERNEL_DTYPES, choose_backend, tl, triton
from ..dropout import dropout_mask, keep_threshold, resolve_seed
from ..norm.api import MAX_HIDDEN_SIZE
from ..norm.kernels import Config, empty_gradient, forward_config, normalised, row_statistics, sum_gradient
from ..rows import as_rows, launch_sum_partials, num_programs_for, row_keep, row_stride, row_tile

# Sorted tokens a program adds up: 65k tokens make 6144 programs, three times what an H200 holds at once, and the rows
# of partial sums are a sixteenth of what was read.
CHUNK = 32


# ------------------------------------------------------------------------------------------------------------- kernels
#
# Offsets are 64 bits. Ids are not trusted: the host cannot look at them without waiting for the device. One out of
# range is clamped, and makes its row NaN.


@triton.jit
def _table_rows(ids_ptr, rows, num_rows, table_rows):
    """(row of the table, whether the id was one) for each row of a tile."""
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
    clamped = tl.minimum(tl.maximum(ids, 0), table_rows - 1)
    return clamped, ids == clamped


@triton.jit
def _gather(table_ptr, table_rows, mask, H: tl.constexpr, BLOCK_H: tl.constexpr):
    offsets = table_rows[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
    return tl.load(table_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "num_rows", "p_threshold"])
def _forward(
    word_ids_ptr,  # [T] int64 or int32
    type_ids_ptr,  # [T]
    position_ids_ptr,  # [T]
    word_ptr,  # [num_words, H] contiguous, as all tables
    type_ptr,  # [num_types, H]
    position_ptr,  # [num_positions, H]
    weight_ptr,  # [H] or None
    bias_ptr,  # [H] or None
    seed_ptr,  # [1] int64, or None: no dropout
    y_ptr,  # [T, H] contiguous
    mean_ptr,  # [T] float32, or None: not kept
    rstd_ptr,  # as mean
    num_words,
    num_types,
    num_positions,
    num_rows,
    p_threshold,
    keep_scale,
    eps,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tile = tl.program_id(0)
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
    words, is_word = _table_rows(word_ids_ptr, rows, num_rows, num_words)
    types, is_type = _table_rows(type_ids_ptr, rows, num_rows, num_types)
    positions, is_position = _table_rows(position_ids_ptr, rows, num_rows, num_positions)
    s = _gather(word_ptr, words, mask, H, BLOCK_H) + _gather(type_ptr, types, mask, H, BLOCK_H)
    s += _gather(position_ptr, positions, mask, H, BLOCK_H)

    y, mean, rstd = row_statistics(s, mask, eps, H)
    # The kept r is NaN too, and with it every gradient of the row.
    are_ids = is_word & is_type & is_position
    rstd = tl.where(are_ids, rstd, float("nan"))
    y = tl.where(are_ids[:, None], y, float("nan"))

    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        y = tl.where(row_keep(tl.load(seed_ptr), p_threshold, tile, H, BLOCK_M, BLOCK_H), y * keep_scale, 0.0)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "padding_idx", "num_rows", "p_threshold"])
def _gradient(
    dy_ptr,  # [T, H]
    word_ids_ptr,  # [T] int64 or int32
    type_ids_ptr,  # [T]
    position_ids_ptr,  # [T]
    word_ptr,  # [num_words, H] contiguous, as all tables
    type_ptr,  # [num_types, H]
    position_ptr,  # [num_positions, H]
    weight_ptr,  # [H] or None
    mean_ptr,  # [T] float32
    rstd_ptr,  # as mean
    seed_ptr,  # [1] int64, or None: no dropout
    g_ptr,  # [T, H] contiguous, or None: no table wants a gradient
    word_keys_ptr,  # [T] int32, or None: that table wants no gradient
    type_keys_ptr,  # as word_keys
    position_keys_ptr,  # as word_keys
    dweight_ptr,  # [P, H] float32 or None: partial sums, a row a program
    dbias_ptr,  # as dweight
    stride_dy,  # elements from row to row, or None: H
    num_words,
    num_types,
    num_positions,
    padding_idx,  # −1: none
    num_rows,
    p_threshold,
    keep_scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_H)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < num_rows
        offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            dy = tl.where(row_keep(seed, p_threshold, tile, H, BLOCK_M, BLOCK_H), dy * keep_scale, 0.0)
        words, _ = _table_rows(word_ids_ptr, rows, num_rows, num_words)
        types, _ = _table_rows(type_ids_ptr, rows, num_rows, num_types)
        positions, _ = _table_rows(position_ids_ptr, rows, num_rows, num_positions)
        s = _gather(word_ptr, words, mask, H, BLOCK_H) + _gather(type_ptr, types, mask, H, BLOCK_H)
        s += _gather(position_ptr, positions, mask, H, BLOCK_H)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)

        xhat = normalised(s, mean, rstd, H, BLOCK_H)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if g_ptr is not None:
            h = dy
            if weight_ptr is not None:
                h = dy * weight
            g = sum_gradient(h, xhat, rstd, H)
            offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
            tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
            if word_keys_ptr is not None:
                nowhere = num_words + num_types + num_positions
                keys = tl.where(words == padding_idx, nowhere, words).to(tl.int32)
                tl.store(word_keys_ptr + rows, keys, mask=in_rows)
            if type_keys_ptr is not None:
                tl.store(type_keys_ptr + rows, (types + num_words).to(tl.int32), mask=in_rows)
            if position_keys_ptr is not None:
                keys = (positions + num_words + num_types).to(tl.int32)
                tl.store(position_keys_ptr + rows, keys, mask=in_rows)

    partial = tl.program_id(0) * H + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=columns < H)


@triton.jit
def _store_table_row(
    key, value, columns, dword_ptr, dtype_ptr, dposition_ptr, num_words, num_types, num_positions, H: tl.constexpr
):
    """Write a finished row to the table that its key lies in; nowhere for a key beyond the last."""
    row = tl.cast(key, tl.int64)
    if key < num_words:
        tl.store(dword_ptr + row * H + columns, value.to(dword_ptr.dtype.element_ty), mask=columns < H)
    elif key < num_words + num_types:
        row -= num_words
        tl.store(dtype_ptr + row * H + columns, value.to(dtype_ptr.dtype.element_ty), mask=columns < H)
    elif key < num_words + num_types + num_positions:
        row -= num_words + num_types
        tl.store(dposition_ptr + row * H + columns, value.to(dposition_ptr.dtype.element_ty), mask=columns < H)


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "num_rows", "num_keys"])
def _sum_runs(
    g_ptr,  # [T, H] contiguous
    keys_ptr,  # [N] int32, rising; N a multiple of T
    order_ptr,  # [N] int64: where the key stood before sorting; modulo T its row of g
    partial_ptr,  # [chunks, 2, H] float32: sum of the run that came in over the chunk's edge, of the one that leaves
    dword_ptr,  # [num_words, H] contiguous, as all tables' gradients
    dtype_ptr,  # [num_types, H]
    dposition_ptr,  # [num_positions, H]
    num_words,
    num_types,
    num_positions,
    num_rows,
    num_keys,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.arange(0, BLOCK_H)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, num_keys)
    nowhere = num_words + num_types + num_positions
    key = tl.load(keys_ptr + start)
    came_in = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for i in range(start, end):
        row = tl.load(order_ptr + i)
        # The remainder by T: a 64-bit division would cost more than the row's addition.
        row = tl.where(row >= num_rows, row - num_rows, row)
        row = tl.where(row >= num_rows, row - num_rows, row)
        mask = (columns < H) & (key < nowhere)
        total += tl.load(g_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        next_key = tl.load(keys_ptr + i + 1, mask=i + 1 < num_keys, other=-1)
        if next_key != key:
            if came_in:
                tl.store(partial_ptr + 2 * chunk * H + columns, total, mask=columns < H)
            else:
                _store_table_row(
                    key,
                    total,
                    columns,
                    dword_ptr,
                    dtype_ptr,
                    dposition_ptr,
                    num_words,
                    num_types,
                    num_positions,
                    H,
                )
            total = tl.zeros((BLOCK_H,), dtype=tl.float32)
            came_in = False
        elif i + 1 == end:
            slot = 2 * chunk + tl.where(came_in, 0, 1)
            tl.store(partial_ptr + slot * H + columns, total, mask=columns < H)
        key = next_key


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "num_keys"])
def _join_runs(
    keys_ptr,  # [N] int32, rising
    partial_ptr,  # [chunks, 2, H] float32, of _sum_runs
    dword_ptr,  # [num_words, H] contiguous, as all tables' gradients
    dtype_ptr,  # [num_types, H]
    dposition_ptr,  # [num_positions, H]
    num_words,
    num_types,
    num_positions,
    num_keys,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = chunk * CHUNK
    following = start + CHUNK
    key = tl.load(keys_ptr + tl.minimum(following, num_keys) - 1)
    # Keys rise: the last of this chunk stood before the chunk too only if the run came in.
    came_in = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    leaves = tl.load(keys_ptr + following, mask=following < num_keys, other=-1) == key
    if came_in | (leaves == 0) | (key >= num_words + num_types + num_positions):
        return
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    first = chunk + 1
    first_key = key
    while first_key == key:
        chunks = first + tl.arange(0, BLOCK_P)
        chunk_keys = tl.load(keys_ptr + chunks * CHUNK, mask=chunks * CHUNK < num_keys, other=-1)
        mask = (chunk_keys == key)[:, None] & (columns < H)[None, :]
        total += tl.load(partial_ptr + 2 * chunks[:, None] * H + columns[None, :], mask=mask, other=0.0)
        first += BLOCK_P
        first_key = tl.load(keys_ptr + first * CHUNK, mask=first * CHUNK < num_keys, other=-1)
    own = tl.load(partial_ptr + (2 * chunk + 1) * H + columns, mask=columns < H, other=0.0)
    _store_table_row(
        key,
        own + tl.sum(total, axis=0),
        columns,
        dword_ptr,
        dtype_ptr,
        dposition_ptr,
        num_words,
        num_types,
        num_positions,
        H,
    )


# ------------------------------------------------------------------------------------------------------------ launcher


def _gradient_config(hidden_size: int) -> Config:
    # 8 elements a thread, half of `layernorm`'s: with the rows of three tables in flight too, 16 leave registers for
    # one block a multiprocessor where the grid counts on two.
    block_h = max(8, triton.next_power_of_2(hidden_size))
    return Config(min(64, max(1, 2048 // block_h)), block_h, 8 if block_h <= 2048 else 16)


def _launch_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_size, num_rows = word_weight.shape[1], input_ids.numel()
    y = torch.empty((*input_ids.shape, hidden_size), dtype=out_dtype, device=input_ids.device)
    kept_shape = input_ids.shape if keep else (0,)
    mean, rstd = (torch.empty(kept_shape, dtype=torch.float32, device=input_ids.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean, rstd
    config = forward_config(hidden_size)
    with torch.cuda.device_of(input_ids):
        _forward[(triton.cdiv(num_rows, config.block_m),)](
            input_ids.contiguous(),
            token_type_ids.contiguous(),
            position_ids.contiguous(),
            word_weight.contiguous(),
            token_type_weight.contiguous(),
            position_weight.contiguous(),
            None if norm_weight is None else norm_weight.contiguous(),
            None if norm_bias is None else norm_bias.contiguous(),
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
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def _launch_backward(
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
    word_grad: bool,
    token_type_grad: bool,
    position_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device, hidden_size, num_rows = dy.device, word_weight.shape[1], input_ids.numel()
    tables = (word_weight, token_type_weight, position_weight)
    wanted = (word_grad, token_type_grad, position_grad)
    dtables = [
        torch.zeros(table.shape if grad else (0,), dtype=table.dtype, device=device)
        for table, grad in zip(tables, wanted, strict=True)
    ]
    dweight = empty_gradient(word_weight, norm_weight, weight_grad)
    dbias = empty_gradient(word_weight, norm_bias, bias_grad)
    if dy.numel() == 0:
        return dtables[0], dtables[1], dtables[2], dweight.zero_(), dbias.zero_()
    dy_rows = as_rows(dy, hidden_size)
    g = torch.empty((num_rows, hidden_size), dtype=word_weight.dtype, device=device) if any(wanted) else None
    keys = torch.empty((sum(wanted), num_rows), dtype=torch.int32, device=device)
    rows_of_keys = iter(keys)
    config = _gradient_config(hidden_size)
    num_programs = num_programs_for(device, triton.cdiv(num_rows, config.block_m), config.num_warps)
    partial = (num_programs, hidden_size)
    dweight_partial = torch.empty(partial, dtype=torch.float32, device=device) if weight_grad else None
    dbias_partial = torch.empty(partial, dtype=torch.float32, device=device) if bias_grad else None
    table_sizes = [table.shape[0] for table in tables]
    with torch.cuda.device_of(dy):
        _gradient[(num_programs,)](
            dy_rows,
            input_ids.contiguous(),
            token_type_ids.contiguous(),
            position_ids.contiguous(),
            *(table.contiguous() for table in tables),
            None if norm_weight is None else norm_weight.contiguous(),
            mean,
            rstd,
            seed,
            g,
            *(next(rows_of_keys) if grad else None for grad in wanted),
            dweight_partial,
            dbias_partial,
            row_stride(dy_rows),
            *table_sizes,
            -1 if padding_idx is None else padding_idx,
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            H=hidden_size,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            # Two stages of 16384 float32 columns exceed any chip's shared memory, of 8192 that of most.
            STAGES=2 if config.block_h <= 4096 else 1,
            num_warps=config.num_warps,
        )
        launch_sum_partials([(dweight_partial, dweight), (dbias_partial, dbias)])
        if g is not None:
            _sum_by_key(g, keys, dtables, table_sizes)
    return dtables[0], dtables[1], dtables[2], dweight, dbias


def _sum_by_key(g: Tensor, keys: Tensor, dtables: list[Tensor], table_sizes: list[int]) -> None:
    """Add up g's rows by key into the tables' gradients. g: [T, H]; keys: [tables with a gradient, T]."""
    num_rows, hidden_size = g.shape
    sorted_keys, order = torch.sort(keys.view(-1), stable=True)
    num_keys = sorted_keys.numel()
    num_chunks = triton.cdiv(num_keys, CHUNK)
    partial = torch.empty((num_chunks, 2, hidden_size), dtype=torch.float32, device=g.device)
    block_h, block_c = triton.next_power_of_2(hidden_size), 64
    _sum_runs[(num_chunks,)](
        g,
        sorted_keys,
        order,
        partial,
        *dtables,
        *table_sizes,
        num_rows,
        num_keys,
        H=hidden_size,
        BLOCK_H=block_h,
        CHUNK=CHUNK,
        num_warps=min(16, max(1, block_h // 256)),
    )
    _join_runs[(num_chunks, triton.cdiv(hidden_size, block_c))](
        sorted_keys,
        partial,
        *dtables,
        *table_sizes,
        num_keys,
        H=hidden_size,
        CHUNK=CHUNK,
        BLOCK_P=64,
        BLOCK_C=block_c,
        num_warps=4,
    )


# ------------------------------------------------------------------------------------------------------------ operator

_library = torch.library.Library("fusebert", "FRAGMENT")
_library.define(
    "embed_layernorm(Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word_weight, "
    "Tensor token_type_weight, Tensor position_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, float p, "
    "float eps, ScalarType out_dtype, bool keep) -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "embed_layernorm_backward(Tensor dy, Tensor input_ids, Tensor token_type_ids, Tensor position_ids, "
    "Tensor word_weight, Tensor token_type_weight, Tensor position_weight, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor mean, Tensor rstd, Tensor? seed, float p, int? padding_idx, bool word_grad, bool token_type_grad, "
    "bool position_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor dword, Tensor dtoken_type, Tensor dposition, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("embed_layernorm", _launch_forward, _device)
    _library.impl("embed_layernorm_backward", _launch_backward, _device)
_forward_op = torch.ops.fusebert.embed_layernorm.default
_backward_op = torch.ops.fusebert.embed_layernorm_backward.default


@torch.library.register_fake("fusebert::embed_layernorm", lib=_library)
def _fake_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    y = word_weight.new_empty((*input_ids.shape, word_weight.shape[1]), dtype=out_dtype)
    kept_shape = input_ids.shape if keep else (0,)
    mean, rstd = (word_weight.new_empty(kept_shape, dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


@torch.library.register_fake("fusebert::embed_layernorm_backward", lib=_library)
def _fake_backward(
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
    word_grad: bool,
    token_type_grad: bool,
    position_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dword, dtoken_type, dposition = (
        table.new_empty(table.shape if grad else (0,))
        for table, grad in (
            (word_weight, word_grad),
            (token_type_weight, token_type_grad),
            (position_weight, position_grad),
        )
    )
    dweight = empty_gradient(word_weight, norm_weight, weight_grad)
    dbias = empty_gradient(word_weight, norm_bias, bias_grad)
    return dword, dtoken_type, dposition, dweight, dbias


class _EmbedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        word_weight: Tensor,
        token_type_weight: Tensor,
        position_weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        seed: Tensor | None,
        p: float,
        eps: float,
        padding_idx: int | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ids = (input_ids, token_type_ids, position_ids)
        parameters = (word_weight, token_type_weight, position_weight, norm_weight, norm_bias)
        y, mean, rstd = _forward_op(*ids, *parameters, seed, p, eps, out_dtype, True)
        ctx.save_for_backward(*ids, *parameters, mean, rstd, seed)
        ctx.p, ctx.padding_idx = p, padding_idx
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:5]
        gradients = _backward_op(dy, *ctx.saved_tensors, ctx.p, ctx.padding_idx, *wanted)
        return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 8)


# --------------------------------------------------------------------------------------------------------- public name


def _positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T]: each token's distance from its segment's start, of cu_seqlens' dtype; without waiting for the device."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return tokens - cu_seqlens[torch.bucketize(tokens, cu_seqlens, right=True) - 1]


def _readable(x: Tensor) -> bool:
    """Whether looking at the values costs nothing: on a GPU it would stall the stream, and fake tensors have none."""
    return (
        x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, torch._subclasses.FakeTensor)
    )


def _check_cu_seqlens(cu_seqlens: Tensor, input_ids: Tensor) -> None:
    if input_ids.dim() != 1:
        raise ValueError(
            f"with cu_seqlens, input_ids must be packed, [T]; got {tuple(input_ids.shape)}: pass position_ids instead"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [S + 1], S at least 1; got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != input_ids.device:
        raise ValueError(f"cu_seqlens must be on input_ids' device {input_ids.device}; got {cu_seqlens.device}")
    if _readable(cu_seqlens) and (cu_seqlens[0] != 0 or bool((cu_seqlens.diff() < 0).any())):
        raise ValueError(
            f"cu_seqlens must start at 0 and never fall; got "
            f"{cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else cu_seqlens}"
        )


def _check_tables(named_tables: dict[str, Tensor], device: torch.device) -> None:
    word_weight = named_tables["word_weight"]
    for name, table in named_tables.items():
        if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != word_weight.shape[1]:
            width = "H" if word_weight.dim() != 2 else word_weight.shape[1]
            raise ValueError(f"{name} must be [rows, {width}], at least one row; got {tuple(table.shape)}")
        if table.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64; got {table.dtype}")
        if table.dtype != word_weight.dtype:
            raise TypeError(f"{name} must have word_weight's dtype {word_weight.dtype}; got {table.dtype}")
        if table.device != device:
            raise ValueError(f"{name} must be on input_ids' device {device}; got {table.device}")
    if sum(table.shape[0] for table in named_tables.values()) >= 2**31:
        raise ValueError("word_weight, token_type_weight and position_weight together must have less than 2³¹ rows")


def _check_ids(name: str, ids: Tensor, input_ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int64 or int32; got {ids.dtype}")
    if ids.shape != input_ids.shape:
        raise ValueError(f"{name} must have input_ids' shape {tuple(input_ids.shape)}; got {tuple(ids.shape)}: expand")
    if ids.device != input_ids.device:
        raise ValueError(f"{name} must be on input_ids' device {input_ids.device}; got {ids.device}")


def _check_id_values(name: str, ids: Tensor, table_name: str, table: Tensor) -> None:
    """What only the values tell. On a GPU the kernels' NaN stands in for this."""
    if not _readable(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= table.shape[0]:
        raise ValueError(
            f"{name} must be in 0 … {table.shape[0] - 1}, the rows of {table_name}; got {low if low < 0 else high}"
        )


def _check_options(
    word_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    p: float,
    padding_idx: int | None,
    out_dtype: torch.dtype,
) -> None:
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is None:
            continue
        if parameter.shape != word_weight.shape[1:]:
            raise ValueError(
                f"{name} must have shape {tuple(word_weight.shape[1:])}, one entry for each of word_weight's columns; "
                f"got {tuple(parameter.shape)}"
            )
        if parameter.dtype not in (word_weight.dtype, torch.float32):
            raise TypeError(
                f"{name} must have word_weight's dtype {word_weight.dtype} or float32; got {parameter.dtype}"
            )
        if parameter.device != word_weight.device:
            raise ValueError(f"{name} must be on word_weight's device {word_weight.device}; got {parameter.device}")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative; got {eps}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p, the dropout probability, must be in [0, 1); got {p}")
    if padding_idx is not None and not 0 <= padding_idx < word_weight.shape[0]:
        raise ValueError(f"padding_idx must be in 0 … {word_weight.shape[0] - 1}, or None; got {padding_idx}")
    if out_dtype not in (*KERNEL_DTYPES, word_weight.dtype):
        raise TypeError(f"out_dtype must be bfloat16, float16, float32 or the tables' dtype; got {out_dtype}")


def _run_reference(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    p: float,
    seed: int | Tensor | None,
    padding_idx: int | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """By PyTorch's operators, dtypes as the kernels'."""
    input_ids, hidden_size = ids[0], tables[0].shape[1]
    mask = None
    if p > 0.0 and seed is not None:
        seed = resolve_seed(seed, input_ids.device)
        mask = dropout_mask(p, seed, input_ids.numel(), hidden_size, input_ids.device)
        mask = mask.view(*input_ids.shape, hidden_size)
    return reference.embed_layernorm(
        *ids,
        *tables,
        norm_weight,
        norm_bias,
        eps=eps,
        p=p,
        padding_idx=padding_idx,
        out_dtype=out_dtype,
        dropout_mask=mask,
    )


def embed_layernorm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    word_weight: Tensor,
    token_type_weight: Tensor,
    position_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Dropout(layernorm(word_weight[input_ids] + token_type_weight[token_type_ids] + position_weight[position_ids])).

    BERT's embeddings (Devlin et al. 2018, figure 2). Statistics are float32. Nothing waits for the device and every
    shape is constant, so a CUDA graph can hold forward and backward. Differentiable once: asking for second derivatives
    of the Triton path raises RuntimeError.

    Args:
        input_ids, token_type_ids, position_ids: int64 or int32 [..], one shape. On the CPU an id outside its table is a
            ValueError; on a GPU, where looking would stall the stream, its row becomes NaN (0 where dropped) and so do
            the gradients it takes part in.
        word_weight, token_type_weight, position_weight: [V, H], [token types, H], [positions, H] of one dtype,
            bfloat16, float16 or float32; float64 runs the reference, and so do H > 16384 and tensors on the CPU. Their
            gradients are dense.
        norm_weight, norm_bias: [H], each None (1 and 0), the tables' dtype or float32.
        eps: added to the variance; BERT's is 1e-12.
        p: the probability that an element of the result is dropped; the others are scaled by 1 / (1 − p).
        seed: which mask; as in `dropout_add_layernorm`, whose rows are here the tokens in order.
        padding_idx: that row of word_weight gets no gradient from here, as in ``nn.Embedding``.
        out_dtype: of the result; the tables' when None. bfloat16 from float32 tables is what follows under autocast.
        cu_seqlens: int32 or int64 [S + 1], only with position_ids None and ids [T]: positions count from 0 in each
            segment cu_seqlens[s] … cu_seqlens[s + 1] − 1, and again behind the last. Found outside the kernel, by a
            bisection over cu_seqlens in four small launches: the backward needs them too.

    Returns:
        [.., H], contiguous, of out_dtype.

    Raises:
        ValueError: a shape, a device, a negative eps, p outside [0, 1), padding_idx outside the table, both or neither
            of position_ids and cu_seqlens; on the CPU, also an id out of range or a cu_seqlens that falls.
        TypeError: a dtype, or a seed of another type.
    """
    tables = (word_weight, token_type_weight, position_weight)
    _check_ids("input_ids", input_ids, input_ids)
    if (position_ids is None) == (cu_seqlens is None):
        raise ValueError(
            "position_ids and cu_seqlens: give one of them, the other None; got "
            + ("neither" if position_ids is None else "both")
        )
    named_tables = dict(zip(("word_weight", "token_type_weight", "position_weight"), tables, strict=True))
    _check_tables(named_tables, input_ids.device)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, input_ids)
        position_ids = _positions(cu_seqlens, input_ids.shape[0])
    assert position_ids is not None
    ids = (input_ids, token_type_ids, position_ids)
    for name, of, (table_name, table) in zip(
        ("input_ids", "token_type_ids", "position_ids"), ids, named_tables.items(), strict=True
    ):
        _check_ids(name, of, input_ids)
        _check_id_values(name, of, table_name, table)
    out_dtype = word_weight.dtype if out_dtype is None else out_dtype
    _check_options(word_weight, norm_weight, norm_bias, eps, p, padding_idx, out_dtype)
    if choose_backend(word_weight) == "reference" or word_weight.shape[1] > MAX_HIDDEN_SIZE:
        return _run_reference(ids, tables, norm_weight, norm_bias, eps, p, seed, padding_idx, out_dtype)
    seed = resolve_seed(seed, input_ids.device) if p > 0.0 else None
    parameters = (*tables, norm_weight, norm_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parameters):
        y: Tensor = _EmbedLayerNorm.apply(*parameters, *ids, seed, p, eps, padding_idx, out_dtype)
        return y
    y, _, _ = _forward_op(*ids, *parameters, seed, p, eps, out_dtype, False)
    return y


__all__ = ["embed_layernorm"]
