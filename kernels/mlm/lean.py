"""The masked-LM loss without logits: tiles of hidden · weightᵀ live in registers and are gone (Wijmans et al. 2024).

The equations stand at the top of ``mlm_loss.py``. Nothing of size M · V is ever stored:

    forward     a program has 128 rows and a share of the vocabulary, and keeps (m, l), the label's logit, Σ_w x_w and
                the arg max of each row; a second, small kernel merges the shares of a row, in order
    backward    G is made again, tile by tile, from hidden, weight and (m, l), by the kernel below, twice: once where a
                program owns rows and walks over the vocabulary (dH), once where it owns words and walks over the rows
                (dW, db). What a program owns it sums in registers, in fp32, and writes once, in the gradient's dtype.

    FLOPs       2 MHV forward; 4 MHV for each of dH and dW: 10 MHV where the products alone are 6
    memory      the gradients, 16 bytes a row, and in the forward 20 bytes a row and share (2.8 MB for 9830 rows)

Cut cross-entropy makes G once for both (8 MHV), and so has to add into one of them from many programs: locks, sums
rounded to 16 bits in an order that changes. Owning both costs 2 MHV more and keeps the promise of this library: the
same inputs give the same bits. An fp32 workspace for unfinished sums would let tiles be wider; it would be as large as
the gradients, and this is the mode for those who have no memory left.

A tile [T, O] of O owned by T visited vectors reads 2 TH bytes of visited ones for 4 TOH FLOPs: 2·O FLOPs a byte (O at
most 64, as H · O sums fill the register file), from L2, where the visited matrix stays. Where a tile of both sides fits
into shared memory (H ≤ 1024 in 16 bits) a visited vector is loaded once for both products, otherwise twice.

Logits are made three times and have to be the same bits: p of the largest is 1 − (something small) only if its x is the
x that m was taken from. They are: each is a sum over H in ascending order in fp32, whatever the tile and its
orientation. fp32 inputs take the ordinary cores (tf32 where torch would, see `backend.dot_precision`).

Skipping: where the softmax is sharp most tiles of G are nearly zero, and their second product, up to 4 of the 10 MHV,
changes nothing. A tile is skipped if each of its rows has Σ|G| ≤ tolerance / (number of tiles in a row) in it, so what
is dropped of a row sums to ``tolerance`` at most. With u the upstream gradient of a row:

    ‖ΔdH_m‖ ≤ tolerance · |u_m| · max_w ‖W_w‖        Σ_w ‖ΔdW_w‖ ≤ tolerance · Σ_m |u_m| ‖H_m‖        Δdb = 0

Rounding G to a dtype of unit roundoff r moves a row's entries by r · Σ|G| in all: at tolerance = r a skipped tile is
numerically zero there. A limit on single entries would give no such bound: a row of 30522 equal probabilities has
every p below bf16's roundoff, and all of its gradient in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..backend import tl, triton
from .softmax_rows import (
    LOWEST,
    NO_COLUMN,
    gradient_of_logits,
    refuse_second_derivative,
    relative_to_largest,
    row_loss,
)

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load_tile(ptr, rows, stride, num_rows, start, H: tl.constexpr, BLOCK: tl.constexpr):
    """Columns start … start + BLOCK − 1 of the given rows, 0 outside of the matrix [num_rows, H]."""
    columns = start + tl.arange(0, BLOCK)
    mask = rows[:, None] < num_rows
    if H % BLOCK != 0:
        mask = mask & (columns[None, :] < H)
    return tl.load(ptr + tl.cast(rows, tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _product(
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
    """Rows of a times rows of b: float32 [A, B]."""
    x = tl.zeros((A, B), dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        a = _load_tile(a_ptr, a_rows, stride_a, num_a, start, H, BLOCK_K)
        b = _load_tile(b_ptr, b_rows, stride_b, num_b, start, H, BLOCK_K)
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    return x


@triton.jit
def _statistics_of_share(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    labels_ptr,  # [M] int64
    max_ptr,  # [shares, M] float32: m of a share of the words; so the others
    sum_ptr,  # float32: l
    label_logit_ptr,  # float32: x_y, 0 in the shares that do not hold y
    logit_sum_ptr,  # float32, SMOOTHING: Σ_w x_w
    best_ptr,  # int32: the first word of the largest logit
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
    # Programs that run together share their words, and between them read every row: both stay in the L2.
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    tile, part = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
    label = tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    label_logit = tl.zeros((BLOCK_M,), dtype=tl.float32)
    logit_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    best = tl.full((BLOCK_M,), NO_COLUMN, dtype=tl.int32)
    for start in range(part * share, tl.minimum(part * share + share, vocab_size), BLOCK_N):
        words = start + tl.arange(0, BLOCK_N)
        exists = (words < vocab_size)[None, :]
        x = _product(
            hidden_ptr, weight_ptr, rows, words, stride_hm, stride_wv, num_rows, vocab_size, H, PRECISION, BLOCK_K,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if bias_ptr is not None:
            x += tl.load(bias_ptr + words, mask=words < vocab_size, other=0.0).to(tl.float32)[None, :]
        label_logit += tl.sum(tl.where(words[None, :] == label[:, None], x, 0.0), axis=1)
        if SMOOTHING:
            logit_sum += tl.sum(tl.where(exists, x, 0.0), axis=1)
        x = tl.where(exists, x, float("-inf"))
        tile_max = tl.max(x, axis=1)
        first = tl.min(tl.where(x == tile_max[:, None], words[None, :], NO_COLUMN), axis=1)
        best = tl.where(tile_max > m, first, best)
        m_new = tl.maximum(m, tile_max)
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)
        m = m_new
    out, mask = tl.cast(part, tl.int64) * num_rows + rows, rows < num_rows
    tl.store(max_ptr + out, m, mask=mask)
    tl.store(sum_ptr + out, l, mask=mask)
    tl.store(label_logit_ptr + out, label_logit, mask=mask)
    tl.store(best_ptr + out, best, mask=mask)
    if SMOOTHING:
        tl.store(logit_sum_ptr + out, logit_sum, mask=mask)


@triton.jit
def _merge_shares(
    labels_ptr,  # [M] int64
    part_max_ptr,  # [shares, M], as _statistics_of_share left them
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
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < num_rows
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    label_logit = tl.zeros((BLOCK_M,), dtype=tl.float32)
    logit_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    best = tl.full((BLOCK_M,), NO_COLUMN, dtype=tl.int32)
    for part in range(0, num_shares):
        source = tl.cast(part, tl.int64) * num_rows + rows
        part_max = tl.load(part_max_ptr + source, mask=mask, other=LOWEST)
        part_sum = tl.load(part_sum_ptr + source, mask=mask, other=0.0)
        best = tl.where(part_max > m, tl.load(part_best_ptr + source, mask=mask, other=0), best)
        m_new = tl.maximum(m, part_max)
        l = l * tl.exp(m - m_new) + part_sum * tl.exp(part_max - m_new)
        m = m_new
        label_logit += tl.load(part_label_logit_ptr + source, mask=mask, other=0.0)
        if SMOOTHING:
            logit_sum += tl.load(part_logit_sum_ptr + source, mask=mask, other=0.0)

    label = tl.load(labels_ptr + rows, mask=mask, other=ignore_index)
    labelled = label != ignore_index
    l = tl.where((label >= 0) & (label < vocab_size), l, float("nan"))
    loss = row_loss(m, l, label_logit, logit_sum, vocab_size, label_smoothing, z_loss, SMOOTHING)
    tl.store(loss_ptr + rows, tl.where(labelled, loss, 0.0), mask=mask)
    tl.store(max_ptr + rows, tl.where(labelled, m, 0.0), mask=mask)
    tl.store(sum_ptr + rows, tl.where(labelled, l, 1.0), mask=mask)
    tl.store(correct_ptr + rows, (labelled & (best == label) & (l == l)).to(tl.int32), mask=mask)


@triton.jit
def _owned_gradient(
    own_ptr,  # [num_own, H]: weight if OWNS_WORDS, else hidden
    visited_ptr,  # [num_visited, H]: the other
    bias_ptr,  # [V] or None
    labels_ptr,  # [M] int32: a word, or out of range
    max_ptr,  # [M] float32: m
    sum_ptr,  # [M] float32: l
    row_grad_ptr,  # [M] float32: each row's upstream gradient over factor, 0 without label
    factor_ptr,  # [1] float32
    out_ptr,  # [num_own, H], contiguous, or None: dW or dH
    bias_grad_ptr,  # [V] float32, or None
    stride_own,
    stride_visited,
    num_own,
    num_visited,
    label_smoothing,
    z_loss,
    tile_tolerance,  # SKIP: Σ|G| of a row up to which a tile counts as zero
    H: tl.constexpr,
    OWNS_WORDS: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,  # all of H is summed here, and visited vectors are loaded once
    SLICES: tl.constexpr,  # slices of BLOCK_H columns of H that a program sums
    BLOCK_OWN: tl.constexpr,
    BLOCK_VISITED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    own = tl.program_id(0) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    first_column = tl.program_id(1) * SLICES * BLOCK_H
    dtype = own_ptr.dtype.element_ty
    # Transposed, [visited, own] and [H, own]: a Hopper matrix instruction has at least 64 rows, and fewer are owned.
    sums = ()
    owned = ()
    for i in tl.static_range(SLICES):
        sums = sums + (tl.zeros((BLOCK_H, BLOCK_OWN), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        if RESIDENT:
            owned = owned + (_load_tile(own_ptr, own, stride_own, num_own, i * BLOCK_H, H, BLOCK_H),)  # type: ignore[assignment]  # noqa: RUF005
    bias_sum = tl.zeros((BLOCK_VISITED, BLOCK_OWN), dtype=tl.float32)  # across threads only once, at the end

    for start in range(0, num_visited, BLOCK_VISITED):
        visited = start + tl.arange(0, BLOCK_VISITED)
        loaded = ()
        if RESIDENT:
            x = tl.zeros((BLOCK_VISITED, BLOCK_OWN), dtype=tl.float32)
            for i in tl.static_range(SLICES):
                v = _load_tile(visited_ptr, visited, stride_visited, num_visited, i * BLOCK_H, H, BLOCK_H)
                loaded = loaded + (v,)  # type: ignore[assignment]  # noqa: RUF005
                x = tl.dot(v, tl.trans(owned[i]), x, input_precision=PRECISION)
        else:
            x = _product(
                visited_ptr, own_ptr, visited, own, stride_visited, stride_own, num_visited, num_own, H, PRECISION,
                BLOCK_K, BLOCK_VISITED, BLOCK_OWN,
            )  # fmt: skip
        if OWNS_WORDS:
            rows, words, num_rows, vocab_size = visited[:, None], own[None, :], num_visited, num_own
        else:
            rows, words, num_rows, vocab_size = own[None, :], visited[:, None], num_own, num_visited
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
        g = tl.where((row_grad != 0.0) & (words < vocab_size), g, 0.0)
        matters = True
        if SKIP:
            mass = tl.sum(tl.abs(g), axis=1 if OWNS_WORDS else 0)
            # Not "any mass > tolerance": a row that is NaN has to be seen.
            matters = tl.sum(tl.where(mass <= tile_tolerance, 0, 1), axis=0) > 0
        g *= row_grad
        if bias_grad_ptr is not None:
            bias_sum += g
        if out_ptr is not None:
            g = g.to(dtype)
            if matters:
                updated = ()
                for i in tl.static_range(SLICES):
                    if RESIDENT:
                        v = loaded[i]
                    else:
                        v = _load_tile(
                            visited_ptr, visited, stride_visited, num_visited, first_column + i * BLOCK_H, H, BLOCK_H
                        )
                    updated = updated + (tl.dot(tl.trans(v), g, sums[i], input_precision=PRECISION),)  # type: ignore[assignment]  # noqa: RUF005
                sums = updated

    factor = tl.load(factor_ptr)
    if out_ptr is not None:
        for i in tl.static_range(SLICES):
            columns = first_column + i * BLOCK_H + tl.arange(0, BLOCK_H)
            out = out_ptr + tl.cast(own, tl.int64)[:, None] * H + columns[None, :]
            mask = (own[:, None] < num_own) & (columns[None, :] < H)
            tl.store(out, (tl.trans(sums[i]) * factor).to(dtype), mask=mask)
    if bias_grad_ptr is not None and tl.program_id(1) == 0:
        tl.store(bias_grad_ptr + own, tl.sum(bias_sum, axis=0) * factor, mask=own < num_own)


# ----------------------------------------------------------------------------------------------------------- launchers

MOST_PROGRAMS = 1024  # of the forward: enough for eight on each multiprocessor of the largest chips


def _launch_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, m, l: float32 [M]; correct: int32 [M])."""
    (rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    losses, row_max, row_sum = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
    correct = labels.new_empty(rows, dtype=torch.int32)
    if not rows:
        return losses, row_max, row_sum, correct
    block_m, block_n, block_k = (128, 128, 64) if hidden.element_size() == 2 else (64, 64, 32)
    if backend.architecture() >= 100:
        block_n = 64  # with 128 the tile, read from tensor memory whole, spills
    block_k = min(block_k, max(triton.next_power_of_2(hidden_size), 16))
    tiles, word_blocks = triton.cdiv(rows, block_m), triton.cdiv(vocab_size, block_n)
    share = triton.cdiv(word_blocks, min(word_blocks, max(MOST_PROGRAMS // tiles, 1))) * block_n
    shares = triton.cdiv(vocab_size, share)
    floats = hidden.new_empty(4 if label_smoothing > 0 else 3, shares, rows, dtype=torch.float32)
    best = labels.new_empty(shares, rows, dtype=torch.int32)
    logit_sum = floats[3] if label_smoothing > 0 else None
    _statistics_of_share[(tiles * shares,)](
        hidden, weight, bias, labels, floats[0], floats[1], floats[2], logit_sum, best, hidden.stride(0),
        weight.stride(0), rows, vocab_size, share, H=hidden_size, SMOOTHING=label_smoothing > 0,
        PRECISION=backend.dot_precision(hidden.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8,
        num_stages=3,
    )  # fmt: skip
    _merge_shares[(triton.cdiv(rows, 128),)](
        labels, floats[0], floats[1], floats[2], logit_sum, best, losses, row_max, row_sum, correct, rows, shares,
        vocab_size, ignore_index, label_smoothing, z_loss, SMOOTHING=label_smoothing > 0, BLOCK_M=128, num_warps=4,
    )  # fmt: skip
    return losses, row_max, row_sum, correct


def _tiling(own: Tensor, skip: bool) -> tuple[bool, int, int, int, int]:
    """(RESIDENT, columns of H a program sums at most, BLOCK_OWN, BLOCK_VISITED, BLOCK_H) of `_owned_gradient`.

    The sums, at most 1024 columns by 32 vectors, are half of the register file; on Blackwell they lie in tensor memory.
    Chosen by what the compiler makes of them (`fusebert.bench.aot`): no spills. Not yet timed on a GPU.
    """
    hidden_size, arch = own.shape[1], backend.architecture()
    whole = max(triton.next_power_of_2(hidden_size), 16)
    if own.element_size() == 4:
        return False, 256, 32, 16, min(64, whole)
    if arch // 10 == 9 and hidden_size <= 768 and not skip:  # a branch between the products costs the registers
        return True, 768, 64 if hidden_size <= 256 else 32, 64, min(128, whole)
    wide = arch >= 100 and hidden_size <= 768
    return False, 1024, 64 if wide else 32, 64 if arch >= 90 else 32, min(256, whole)


def _launch_gradient(
    own: Tensor,
    visited: Tensor,
    owns_words: bool,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_grad: Tensor,
    factor: Tensor,
    out: Tensor | None,
    bias_grad: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
) -> None:
    """Writes ``out``, the gradient of ``own``, and ``bias_grad``; (own, visited) is (weight, hidden) or the reverse."""
    (num_own, hidden_size), num_visited = own.shape, visited.shape[0]
    # Triton 3.7 cannot take sums in tensor memory through a branch: on Blackwell nothing is skipped.
    skip = tolerance > 0 and backend.architecture() < 100
    resident, most, block_own, block_visited, block_h = _tiling(own, skip)
    slices = triton.cdiv(min(hidden_size, most), block_h)
    word_tiles = triton.cdiv(num_own, block_own) if owns_words else triton.cdiv(num_visited, block_visited)
    groups = triton.cdiv(hidden_size, slices * block_h) if out is not None else 1
    _owned_gradient[(triton.cdiv(num_own, block_own), groups)](
        own, visited, bias, labels, row_max, row_sum, row_grad, factor, out, bias_grad, own.stride(0),
        visited.stride(0), num_own, num_visited, label_smoothing, z_loss, tolerance / word_tiles,
        H=hidden_size, OWNS_WORDS=owns_words, Z_LOSS=z_loss > 0, SKIP=skip, PRECISION=backend.dot_precision(own.dtype),
        RESIDENT=resident, SLICES=slices, BLOCK_OWN=block_own, BLOCK_VISITED=block_visited, BLOCK_H=block_h,
        BLOCK_K=min(64, block_h), num_warps=8, num_stages=1 if resident else 3,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("fusebert::lean_linear_cross_entropy", mutates_args=())
def lean_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden: [M, H]. weight: [V, H]. bias: [V] or None. labels: int64 [M]. tolerance: for the backward.

    Returns losses (float32 [M]), the count of right rows (int64 []), m and l (float32 [M]).
    """
    hidden, weight, bias = _unit_stride(hidden), _unit_stride(weight), None if bias is None else _unit_stride(bias)
    losses, row_max, row_sum, correct = _launch_statistics(
        hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss
    )
    return losses, correct.sum(), row_max, row_sum


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lean_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, row_max, row_sum = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, labels.new_empty(()), row_max, row_sum


@torch.library.custom_op("fusebert::lean_linear_cross_entropy_backward", mutates_args=())
def _lean_backward(
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Σ d_losses · losses: dH [M, H], dW [V, H], db float32 [V]; without elements if not needed."""
    hidden, weight, bias = _unit_stride(hidden), _unit_stride(weight), None if bias is None else _unit_stride(bias)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1]))
    d_weight = weight.new_empty(weight.shape if need_weight else (0, weight.shape[1]))
    d_bias = hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32)
    labelled = labels != ignore_index
    row_grad, factor = relative_to_largest(torch.where(labelled, d_losses, 0.0))
    words = labels.clamp(-1, weight.shape[0]).to(torch.int32)
    rows = (bias, words, row_max, row_sum, row_grad, factor)
    options = (label_smoothing, z_loss, tolerance)
    if need_hidden and hidden.shape[0]:
        _launch_gradient(hidden, weight, False, *rows, d_hidden, None, *options)
    if need_weight or need_bias:
        _launch_gradient(
            weight, hidden, True, *rows, d_weight if need_weight else None, d_bias if need_bias else None, *options
        )
    return d_hidden, d_weight, d_bias


@_lean_backward.register_fake
def _(
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if need_weight else (0, weight.shape[1])),
        hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *ctx.options = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[2:])


def _backward(ctx: Any, d_losses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    if d_losses is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[:3]
    d_hidden, d_weight, d_bias = _lean_backward(d_losses, *ctx.saved_tensors, *ctx.options, *needed)
    return (
        d_hidden if needed[0] else None,
        d_weight if needed[1] else None,
        d_bias.to(ctx.bias_dtype) if needed[2] else None,
        *(None,) * 5,
    )


lean_linear_cross_entropy.register_autograd(_backward, setup_context=_save_inputs)


__all__ = ["lean_linear_cross_entropy"]
