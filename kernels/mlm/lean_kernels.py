"""The Triton kernels of the masked-LM loss without logits in memory; `lean` launches them, README.md derives them.

    mlm_lean_forward    the row statistics of a share of the vocabulary, for a block of rows
    mlm_lean_merge      the shares of a row, combined in order, and its loss
    mlm_lean_backward   dhidden (a program owns rows and loops over words), or dweight and dbias (the reverse)

All three compute logits, or read statistics of logits, that must be the same bits: 1 − p of the largest logit is exact
only for the logit that m was taken from. Each is a sum over H in ascending order in fp32, for every tile shape.
"""

from __future__ import annotations

from ..backend import tl, triton
from .softmax_rows import LOWEST, NO_COLUMN, gradient_of_logits, row_loss


@triton.jit
def load_rows(ptr, rows, stride, num_rows, start, H: tl.constexpr, BLOCK: tl.constexpr):
    """Columns start … start + BLOCK − 1 of the given rows of [num_rows, H], 0 outside: [len(rows), BLOCK]."""
    columns = start + tl.arange(0, BLOCK)  # [BLOCK]
    mask = rows[:, None] < num_rows
    if H % BLOCK != 0:
        mask = mask & (columns[None, :] < H)
    return tl.load(ptr + tl.cast(rows, tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def product_of_rows(
    a_ptr,  # [num_a, H]
    b_ptr,  # [num_b, H]
    a_rows,  # [A]
    b_rows,  # [B]
    stride_a,
    stride_b,
    num_a,
    num_b,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """a[a_rows] · b[b_rows]ᵀ in float32: [A, B]."""
    x = tl.zeros((A, B), dtype=tl.float32)  # [A, B]
    for start in range(0, H, BLOCK_K):
        a = load_rows(a_ptr, a_rows, stride_a, num_a, start, H, BLOCK_K)  # [A, BLOCK_K]
        b = load_rows(b_ptr, b_rows, stride_b, num_b, start, H, BLOCK_K)  # [B, BLOCK_K]
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    return x


@triton.jit
def mlm_lean_forward(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    labels_ptr,  # [M] int64
    max_ptr,  # [shares, M] float32: m over a share of the words
    sum_ptr,  # [shares, M] float32: l
    label_logit_ptr,  # [shares, M] float32: x_y, 0 in the shares that do not contain y
    logit_sum_ptr,  # [shares, M] float32, SMOOTHING: Σ_w x_w
    best_ptr,  # [shares, M] int32: the first word of the largest logit
    stride_hm,
    stride_wv,
    num_rows,
    vocab_size,
    share,  # words, a multiple of BLOCK_N
    H: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Consecutive programs read the same words and, together, all rows: both stay in L2.
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    tile, part = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)  # [BLOCK_M]
    label = tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)  # [BLOCK_M]
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    label_logit = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    logit_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    best = tl.full((BLOCK_M,), NO_COLUMN, dtype=tl.int32)  # [BLOCK_M]
    for start in range(part * share, tl.minimum(part * share + share, vocab_size), BLOCK_N):
        words = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        exists = (words < vocab_size)[None, :]  # [1, BLOCK_N]
        x = product_of_rows(
            hidden_ptr, weight_ptr, rows, words, stride_hm, stride_wv, num_rows, vocab_size, H, PRECISION, BLOCK_K,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if bias_ptr is not None:
            x += tl.load(bias_ptr + words, mask=words < vocab_size, other=0.0).to(tl.float32)[None, :]
        label_logit += tl.sum(tl.where(words[None, :] == label[:, None], x, 0.0), axis=1)
        if SMOOTHING:
            logit_sum += tl.sum(tl.where(exists, x, 0.0), axis=1)
        x = tl.where(exists, x, float("-inf"))
        tile_max = tl.max(x, axis=1)  # [BLOCK_M]
        first = tl.min(tl.where(x == tile_max[:, None], words[None, :], NO_COLUMN), axis=1)  # [BLOCK_M]
        best = tl.where(tile_max > m, first, best)
        m_new = tl.maximum(m, tile_max)  # [BLOCK_M]
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)
        m = m_new
    out, mask = tl.cast(part, tl.int64) * num_rows + rows, rows < num_rows  # [BLOCK_M]
    tl.store(max_ptr + out, m, mask=mask)
    tl.store(sum_ptr + out, l, mask=mask)
    tl.store(label_logit_ptr + out, label_logit, mask=mask)
    tl.store(best_ptr + out, best, mask=mask)
    if SMOOTHING:
        tl.store(logit_sum_ptr + out, logit_sum, mask=mask)


@triton.jit
def mlm_lean_merge(
    labels_ptr,  # [M] int64
    part_max_ptr,  # [shares, M], as the next four: the results of mlm_lean_forward
    part_sum_ptr,
    part_label_logit_ptr,
    part_logit_sum_ptr,
    part_best_ptr,
    loss_ptr,  # [M] float32
    max_ptr,  # [M] float32: m
    sum_ptr,  # [M] float32: l
    correct_ptr,  # [M] int32
    num_rows,
    num_shares,
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask = rows < num_rows  # [BLOCK_M]
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)  # [BLOCK_M]
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    label_logit = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    logit_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)  # [BLOCK_M]
    best = tl.full((BLOCK_M,), NO_COLUMN, dtype=tl.int32)  # [BLOCK_M]
    for part in range(0, num_shares):
        source = tl.cast(part, tl.int64) * num_rows + rows  # [BLOCK_M]
        part_max = tl.load(part_max_ptr + source, mask=mask, other=LOWEST)  # [BLOCK_M]
        part_sum = tl.load(part_sum_ptr + source, mask=mask, other=0.0)  # [BLOCK_M]
        best = tl.where(part_max > m, tl.load(part_best_ptr + source, mask=mask, other=0), best)
        m_new = tl.maximum(m, part_max)  # [BLOCK_M]
        l = l * tl.exp(m - m_new) + part_sum * tl.exp(part_max - m_new)
        m = m_new
        label_logit += tl.load(part_label_logit_ptr + source, mask=mask, other=0.0)
        if SMOOTHING:
            logit_sum += tl.load(part_logit_sum_ptr + source, mask=mask, other=0.0)

    label = tl.load(labels_ptr + rows, mask=mask, other=ignore_index)  # [BLOCK_M]
    labelled = label != ignore_index  # [BLOCK_M]
    l = tl.where((label >= 0) & (label < vocab_size), l, float("nan"))
    loss = row_loss(m, l, label_logit, logit_sum, vocab_size, label_smoothing, z_loss, SMOOTHING)  # [BLOCK_M]
    tl.store(loss_ptr + rows, tl.where(labelled, loss, 0.0), mask=mask)
    tl.store(max_ptr + rows, tl.where(labelled, m, 0.0), mask=mask)
    tl.store(sum_ptr + rows, tl.where(labelled, l, 1.0), mask=mask)
    tl.store(correct_ptr + rows, (labelled & (best == label) & (l == l)).to(tl.int32), mask=mask)


@triton.jit
def mlm_lean_backward(
    own_ptr,  # [num_own, H]: weight if OWNS_WORDS, else hidden
    visited_ptr,  # [num_visited, H]: hidden if OWNS_WORDS, else weight
    bias_ptr,  # [V] or None
    labels_ptr,  # [M] int32: a word, or out of range
    max_ptr,  # [M] float32: m
    sum_ptr,  # [M] float32: l
    row_grad_ptr,  # [M] float32: gradient of each row's loss over factor, 0 without a label
    factor_ptr,  # [1] float32
    out_ptr,  # [num_own, H] contiguous, or None: dweight if OWNS_WORDS, else dhidden
    dbias_ptr,  # [V] float32, or None
    stride_own,
    stride_visited,
    num_own,
    num_visited,
    label_smoothing,
    z_loss,
    tile_tolerance,  # SKIP: the largest Σ|G| of a row in a tile that is skipped
    H: tl.constexpr,
    OWNS_WORDS: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,  # a program sums all of H and loads visited vectors once
    SLICES: tl.constexpr,  # a program sums SLICES · BLOCK_H columns
    BLOCK_OWN: tl.constexpr,
    BLOCK_VISITED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    own = tl.program_id(0) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)  # [BLOCK_OWN]
    first_column = tl.program_id(1) * SLICES * BLOCK_H
    dtype = own_ptr.dtype.element_ty
    # Products are [visited, own] and [H, own]: Hopper's matrix instruction has at least 64 rows; BLOCK_OWN may be 32.
    sums = ()  # SLICES × [BLOCK_H, BLOCK_OWN]
    owned = ()  # RESIDENT: SLICES × [BLOCK_OWN, BLOCK_H]
    for i in tl.static_range(SLICES):
        sums = sums + (tl.zeros((BLOCK_H, BLOCK_OWN), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        if RESIDENT:
            owned = owned + (load_rows(own_ptr, own, stride_own, num_own, i * BLOCK_H, H, BLOCK_H),)  # type: ignore[assignment]  # noqa: RUF005
    bias_sum = tl.zeros((BLOCK_VISITED, BLOCK_OWN), dtype=tl.float32)  # reduced over its rows after the loop

    for start in range(0, num_visited, BLOCK_VISITED):
        visited = start + tl.arange(0, BLOCK_VISITED)  # [BLOCK_VISITED]
        loaded = ()  # RESIDENT: SLICES × [BLOCK_VISITED, BLOCK_H]
        if RESIDENT:
            x = tl.zeros((BLOCK_VISITED, BLOCK_OWN), dtype=tl.float32)  # [BLOCK_VISITED, BLOCK_OWN]
            for i in tl.static_range(SLICES):
                v = load_rows(visited_ptr, visited, stride_visited, num_visited, i * BLOCK_H, H, BLOCK_H)
                loaded = loaded + (v,)  # type: ignore[assignment]  # noqa: RUF005
                x = tl.dot(v, tl.trans(owned[i]), x, input_precision=PRECISION)
        else:
            x = product_of_rows(
                visited_ptr, own_ptr, visited, own, stride_visited, stride_own, num_visited, num_own, H, PRECISION,
                BLOCK_K, BLOCK_VISITED, BLOCK_OWN,
            )  # fmt: skip
        if OWNS_WORDS:
            rows, words, num_rows, vocab_size = visited[:, None], own[None, :], num_visited, num_own
        else:
            rows, words, num_rows, vocab_size = own[None, :], visited[:, None], num_own, num_visited
        # Tensors of a row or a word are [1, BLOCK_OWN] or [BLOCK_VISITED, 1]; x and g are [BLOCK_VISITED, BLOCK_OWN].
        if bias_ptr is not None:
            x += tl.load(bias_ptr + words, mask=words < vocab_size, other=0.0).to(tl.float32)
        label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
        row_max = tl.load(max_ptr + rows, mask=rows < num_rows, other=0.0)
        row_sum = tl.load(sum_ptr + rows, mask=rows < num_rows, other=1.0)
        row_grad = tl.load(row_grad_ptr + rows, mask=rows < num_rows, other=0.0)
        z_slope = 0.0
        if Z_LOSS:
            z_slope = 2.0 * z_loss * (row_max + tl.log(row_sum))
        g = gradient_of_logits(x, words == label, row_max, row_sum, z_slope, vocab_size, label_smoothing)
        g = tl.where((row_grad != 0.0) & (words < vocab_size), g, 0.0)  # [BLOCK_VISITED, BLOCK_OWN]
        matters = True
        if SKIP:
            mass = tl.sum(tl.abs(g), axis=1 if OWNS_WORDS else 0)  # of each row
            # "not mass <= tolerance" rather than "mass > tolerance": NaN must count.
            matters = tl.sum(tl.where(mass <= tile_tolerance, 0, 1), axis=0) > 0
        g *= row_grad
        if dbias_ptr is not None:
            bias_sum += g
        if out_ptr is not None:
            g = g.to(dtype)
            if matters:
                updated = ()
                for i in tl.static_range(SLICES):
                    if RESIDENT:
                        v = loaded[i]
                    else:
                        v = load_rows(
                            visited_ptr, visited, stride_visited, num_visited, first_column + i * BLOCK_H, H, BLOCK_H
                        )
                    updated = updated + (tl.dot(tl.trans(v), g, sums[i], input_precision=PRECISION),)  # type: ignore[assignment]  # noqa: RUF005
                sums = updated

    factor = tl.load(factor_ptr)
    if out_ptr is not None:
        for i in tl.static_range(SLICES):
            columns = first_column + i * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
            out = out_ptr + tl.cast(own, tl.int64)[:, None] * H + columns[None, :]
            mask = (own[:, None] < num_own) & (columns[None, :] < H)
            tl.store(out, (tl.trans(sums[i]) * factor).to(dtype), mask=mask)
    if dbias_ptr is not None and tl.program_id(1) == 0:
        tl.store(dbias_ptr + own, tl.sum(bias_sum, axis=0) * factor, mask=own < num_own)
