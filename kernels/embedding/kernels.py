"""The kernels of embedding + LayerNorm + dropout. README.md has the equations and the summation by id.

Offsets are 64 bits. The host cannot read the ids without a synchronisation, so the kernels check them: an id out of
range is clamped to the table, and its row of the result becomes NaN.
"""

from __future__ import annotations

from ..backend import tl, triton
from ..row_norm import normalise_again, normalise_backward, normalise_forward
from ..rows import row_keep, row_tile


@triton.jit
def load_ids(ids_ptr, rows, num_rows, table_rows):
    """(ids clamped to the table's rows, whether each id was in range), both [BLOCK_M]."""
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)  # [BLOCK_M]
    clamped = tl.minimum(tl.maximum(ids, 0), table_rows - 1)  # [BLOCK_M]
    return clamped, ids == clamped


@triton.jit
def gather_rows(table_ptr, ids, mask, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_M, BLOCK_H] float32: the rows ids [BLOCK_M] of a table [.., H]."""
    offsets = ids[:, None] * H + tl.arange(0, BLOCK_H)[None, :]  # [BLOCK_M, BLOCK_H]
    return tl.load(table_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "num_rows", "p_threshold"])
def embed_layernorm_forward(
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
    rstd_ptr,  # [T] float32, or None: not kept
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
    """s = word + token type + position;  y = c Z∘(weight∘x̂(s) + bias)."""
    tile = tl.program_id(0)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)  # [BLOCK_M, BLOCK_H]
    words, is_word = load_ids(word_ids_ptr, rows, num_rows, num_words)  # [BLOCK_M]
    types, is_type = load_ids(type_ids_ptr, rows, num_rows, num_types)  # [BLOCK_M]
    positions, is_position = load_ids(position_ids_ptr, rows, num_rows, num_positions)  # [BLOCK_M]
    s = gather_rows(word_ptr, words, mask, H, BLOCK_H) + gather_rows(type_ptr, types, mask, H, BLOCK_H)
    s += gather_rows(position_ptr, positions, mask, H, BLOCK_H)  # [BLOCK_M, BLOCK_H]

    y, mean, rstd = normalise_forward(s, mask, eps, H)  # [BLOCK_M, BLOCK_H], [BLOCK_M], [BLOCK_M]
    # An id out of range: the stored rstd is NaN too, and with it every gradient of the row.
    are_ids = is_word & is_type & is_position  # [BLOCK_M]
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
def embed_layernorm_backward(
    dy_ptr,  # [T, H]
    word_ids_ptr,  # [T] int64 or int32
    type_ids_ptr,  # [T]
    position_ids_ptr,  # [T]
    word_ptr,  # [num_words, H] contiguous, as all tables
    type_ptr,  # [num_types, H]
    position_ptr,  # [num_positions, H]
    weight_ptr,  # [H] or None
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    seed_ptr,  # [1] int64, or None: no dropout
    ds_ptr,  # [T, H] contiguous, or None: no table wants a gradient
    word_keys_ptr,  # [T] int32, or None: that table wants no gradient
    type_keys_ptr,  # [T] int32 or None
    position_keys_ptr,  # [T] int32 or None
    dweight_ptr,  # [P, H] float32 or None: partial sums, a row for each program
    dbias_ptr,  # [P, H] float32 or None
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
    """dx̂ = weight∘c Z∘dy;  ds = r (dx̂ − ⟨dx̂⟩ − x̂ ⟨dx̂∘x̂⟩); each token's keys; partial sums of dweight and dbias."""
    columns = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_H]
    dweight = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        in_rows = rows < num_rows  # [BLOCK_M]
        offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H)  # [BLOCK_M, BLOCK_H]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
        if seed_ptr is not None:
            dy = tl.where(row_keep(seed, p_threshold, tile, H, BLOCK_M, BLOCK_H), dy * keep_scale, 0.0)
        words, _ = load_ids(word_ids_ptr, rows, num_rows, num_words)  # [BLOCK_M]
        types, _ = load_ids(type_ids_ptr, rows, num_rows, num_types)  # [BLOCK_M]
        positions, _ = load_ids(position_ids_ptr, rows, num_rows, num_positions)  # [BLOCK_M]
        s = gather_rows(word_ptr, words, mask, H, BLOCK_H) + gather_rows(type_ptr, types, mask, H, BLOCK_H)
        s += gather_rows(position_ptr, positions, mask, H, BLOCK_H)  # [BLOCK_M, BLOCK_H]
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)  # [BLOCK_M]
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)  # [BLOCK_M]

        xhat = normalise_again(s, mean, rstd, H, BLOCK_H)  # [BLOCK_M, BLOCK_H]
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if ds_ptr is not None:
            dxhat = dy  # [BLOCK_M, BLOCK_H]
            if weight_ptr is not None:
                dxhat = dy * weight
            ds = normalise_backward(dxhat, xhat, rstd, H)  # [BLOCK_M, BLOCK_H]
            offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
            tl.store(ds_ptr + offsets, ds.to(ds_ptr.dtype.element_ty), mask=mask)
            if word_keys_ptr is not None:
                no_row = num_words + num_types + num_positions
                keys = tl.where(words == padding_idx, no_row, words).to(tl.int32)  # [BLOCK_M]
                tl.store(word_keys_ptr + rows, keys, mask=in_rows)
            if type_keys_ptr is not None:
                tl.store(type_keys_ptr + rows, (types + num_words).to(tl.int32), mask=in_rows)
            if position_keys_ptr is not None:
                keys = (positions + num_words + num_types).to(tl.int32)  # [BLOCK_M]
                tl.store(position_keys_ptr + rows, keys, mask=in_rows)

    partial = tl.program_id(0) * H + columns  # [BLOCK_H]
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=columns < H)


@triton.jit
def store_table_row(
    key, value, columns, dword_ptr, dtoken_type_ptr, dposition_ptr, num_words, num_types, num_positions, H: tl.constexpr
):
    """Write value [BLOCK_H] to the table row of a key; a key beyond the last row is padding_idx: write nothing."""
    row = tl.cast(key, tl.int64)
    if key < num_words:
        tl.store(dword_ptr + row * H + columns, value.to(dword_ptr.dtype.element_ty), mask=columns < H)
    elif key < num_words + num_types:
        row -= num_words
        tl.store(dtoken_type_ptr + row * H + columns, value.to(dtoken_type_ptr.dtype.element_ty), mask=columns < H)
    elif key < num_words + num_types + num_positions:
        row -= num_words + num_types
        tl.store(dposition_ptr + row * H + columns, value.to(dposition_ptr.dtype.element_ty), mask=columns < H)


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "num_rows", "num_keys"])
def embed_layernorm_sum_runs(
    ds_ptr,  # [T, H] contiguous
    keys_ptr,  # [N] int32, sorted; N is T times the number of tables with a gradient
    order_ptr,  # [N] int64: the key's index before sorting; modulo T its row of ds
    partial_ptr,  # [chunks, 2, H] float32: sums of the run cut by the chunk's start, and of the run cut by its end
    dword_ptr,  # [num_words, H] contiguous, as all tables' gradients
    dtoken_type_ptr,  # [num_types, H]
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
    """Add up the rows of ds of one chunk of sorted keys, run by run."""
    chunk = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, num_keys)
    no_row = num_words + num_types + num_positions
    key = tl.load(keys_ptr + start)
    cut_at_start = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for i in range(start, end):
        row = tl.load(order_ptr + i)
        # row modulo T, for row < 3T. A 64-bit division would cost more than adding the row.
        row = tl.where(row >= num_rows, row - num_rows, row)
        row = tl.where(row >= num_rows, row - num_rows, row)
        mask = (columns < H) & (key < no_row)  # [BLOCK_H]
        total += tl.load(ds_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        next_key = tl.load(keys_ptr + i + 1, mask=i + 1 < num_keys, other=-1)
        if next_key != key:
            if cut_at_start:
                tl.store(partial_ptr + 2 * chunk * H + columns, total, mask=columns < H)
            else:
                store_table_row(
                    key, total, columns,
                    dword_ptr, dtoken_type_ptr, dposition_ptr, num_words, num_types, num_positions, H,
                )  # fmt: skip
            total = tl.zeros((BLOCK_H,), dtype=tl.float32)
            cut_at_start = False
        elif i + 1 == end:
            slot = 2 * chunk + tl.where(cut_at_start, 0, 1)
            tl.store(partial_ptr + slot * H + columns, total, mask=columns < H)
        key = next_key


@triton.jit(do_not_specialize=["num_words", "num_types", "num_positions", "num_keys"])
def embed_layernorm_join_runs(
    keys_ptr,  # [N] int32, sorted
    partial_ptr,  # [chunks, 2, H] float32, of embed_layernorm_sum_runs
    dword_ptr,  # [num_words, H] contiguous, as all tables' gradients
    dtoken_type_ptr,  # [num_types, H]
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
    """Add up the parts of the run that starts in this chunk and continues after it, in the order of the chunks."""
    chunk = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    start = chunk * CHUNK
    end = start + CHUNK
    key = tl.load(keys_ptr + tl.minimum(end, num_keys) - 1)
    # Keys are sorted: if the last key of this chunk is also the key before the chunk, the run started earlier.
    cut_at_start = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    cut_at_end = tl.load(keys_ptr + end, mask=end < num_keys, other=-1) == key
    if cut_at_start | (cut_at_end == 0) | (key >= num_words + num_types + num_positions):
        return
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    first = chunk + 1
    first_key = key
    while first_key == key:
        chunks = first + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        chunk_keys = tl.load(keys_ptr + chunks * CHUNK, mask=chunks * CHUNK < num_keys, other=-1)  # [BLOCK_P]
        mask = (chunk_keys == key)[:, None] & (columns < H)[None, :]  # [BLOCK_P, BLOCK_C]
        total += tl.load(partial_ptr + 2 * chunks[:, None] * H + columns[None, :], mask=mask, other=0.0)
        first += BLOCK_P
        first_key = tl.load(keys_ptr + first * CHUNK, mask=first * CHUNK < num_keys, other=-1)
    own = tl.load(partial_ptr + (2 * chunk + 1) * H + columns, mask=columns < H, other=0.0)  # [BLOCK_C]
    total = own + tl.sum(total, axis=0)  # [BLOCK_C]
    store_table_row(
        key, total, columns, dword_ptr, dtoken_type_ptr, dposition_ptr, num_words, num_types, num_positions, H
    )  # fmt: skip
