"""Cross entropy of logits in memory: its two kernels and the operator fusebert::cross_entropy.

README.md has the equations. Logits are bf16, fp16 or fp32; the softmax is computed in fp32. `chunked` launches the
same kernels on logits that it computes itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import tl, triton
from ..library import register

LOWEST = tl.constexpr(-3.4e38)  # the initial maximum: finite, so that LOWEST − LOWEST is 0 and not NaN
NO_COLUMN = tl.constexpr(2**31 - 1)

TILE_M, BLOCK_M, BLOCK_N = 64, 4, 1024  # of cross_entropy_backward


@triton.jit
def online_softmax_step(
    m,  # [LANES]
    l,  # [LANES]
    x_sum,  # [LANES, VECTOR]
    group,  # [LANES]: first column of the first run that holds the lane's maximum
    row_ptr,
    start,
    vocab_size,
    width,
    SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(m, l, x_sum, group) after columns start … start + LANES · VECTOR − 1.

    A lane reads runs of VECTOR adjacent columns, one 16-byte load each. Lanes are combined once, at the end of the row.
    """
    runs = start + tl.arange(0, LANES) * VECTOR  # [LANES]
    columns = runs[:, None] + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
    if CHECK:
        x = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)  # [LANES, VECTOR]
        inside = columns < vocab_size  # [LANES, VECTOR]
        if SMOOTHING:
            x_sum += tl.where(inside, x, 0.0)
        x = tl.where(inside, x, float("-inf"))
    else:
        x = tl.load(row_ptr + columns).to(tl.float32)  # [LANES, VECTOR]
        if SMOOTHING:
            x_sum += x
    run_max = tl.max(x, axis=1)  # [LANES]
    group = tl.where(run_max > m, runs, group)
    m_new = tl.maximum(m, run_max)  # [LANES]
    # Subtract before scaling: x − m is exact for close values, so logits of 1e4 keep their precision.
    l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)
    return m_new, l, x_sum, group


@triton.jit
def row_loss(m, l, label_logit, logit_sum, vocab_size, label_smoothing, z_loss, SMOOTHING: tl.constexpr):
    """A row's loss from m, l, x_y and Σ_w x_w. Differences from m come first: log l is small beside m."""
    log_sum = tl.log(l)
    lse = m + log_sum
    loss = log_sum + (1.0 - label_smoothing) * (m - label_logit) + z_loss * lse * lse
    if SMOOTHING:
        loss += label_smoothing * (m - logit_sum / vocab_size)
    return loss


@triton.jit
def gradient_of_logits(x, is_label, m, l, z_slope, vocab_size, label_smoothing):
    """G, elementwise: x and is_label are tiles; m, l and z_slope = 2ζ lse broadcast to them."""
    p = tl.exp(x - m) * (1.0 / l)
    smooth = label_smoothing / vocab_size
    # p − target first: the difference of two close numbers is exact.
    g = p - tl.where(is_label, 1.0 - label_smoothing + smooth, smooth)
    return g + z_slope * p


@triton.jit
def cross_entropy_forward(
    logits_ptr,  # [M, width]
    labels_ptr,  # [M] int64
    loss_ptr,  # [M] float32
    max_ptr,  # [M] float32: m
    sum_ptr,  # [M] float32: l
    correct_ptr,  # [M] int32
    stride_m,
    vocab_size,
    width,
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(max_ptr + row, 0.0)
        tl.store(sum_ptr + row, 1.0)
        tl.store(correct_ptr + row, 0)
        return
    row_ptr = logits_ptr + tl.cast(row, tl.int64) * stride_m
    m = tl.full((LANES,), LOWEST, dtype=tl.float32)  # [LANES]
    l = tl.zeros((LANES,), dtype=tl.float32)  # [LANES]
    # Sum over VECTOR after the loop: Triton 3.7's thread-locality pass aborts if the loop does it.
    x_sum = tl.zeros((LANES, VECTOR), dtype=tl.float32)  # [LANES, VECTOR]
    group = tl.zeros((LANES,), dtype=tl.int32)  # [LANES]
    whole = vocab_size // (LANES * VECTOR) * (LANES * VECTOR)
    for start in range(0, whole, LANES * VECTOR):
        m, l, x_sum, group = online_softmax_step(
            m, l, x_sum, group, row_ptr, start, vocab_size, width, SMOOTHING, LANES, VECTOR, False
        )
    if whole < vocab_size:
        m, l, x_sum, group = online_softmax_step(
            m, l, x_sum, group, row_ptr, whole, vocab_size, width, SMOOTHING, LANES, VECTOR, True
        )

    row_max = tl.max(m, axis=0)
    row_sum = tl.sum(l * tl.exp(m - row_max), axis=0)
    # The first arg max: read the first run that holds the maximum once more.
    columns = tl.min(tl.where(m == row_max, group, NO_COLUMN - VECTOR), axis=0) + tl.arange(0, VECTOR)  # [VECTOR]
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)  # [VECTOR]
    arg_max = tl.min(tl.where(x == row_max, columns, NO_COLUMN), axis=0)

    # A label outside the vocabulary is not used as an address; it makes the row's loss and gradient NaN.
    in_range = (label >= 0) & (label < vocab_size)
    x_label = tl.load(row_ptr + label, mask=in_range, other=0.0).to(tl.float32)
    row_sum = tl.where(in_range, row_sum, float("nan"))
    loss = row_loss(
        row_max,
        row_sum,
        x_label,
        tl.sum(tl.sum(x_sum, axis=1), axis=0),
        vocab_size,
        label_smoothing,
        z_loss,
        SMOOTHING,
    )
    tl.store(loss_ptr + row, loss)
    tl.store(max_ptr + row, row_max)
    tl.store(sum_ptr + row, row_sum)
    tl.store(correct_ptr + row, ((arg_max == label) & (row_sum == row_sum)).to(tl.int32))


@triton.jit
def cross_entropy_backward(
    logits_ptr,  # [M, width]
    dlogits_ptr,  # [M, width]: G; may be the logits themselves
    labels_ptr,  # [M] int64
    max_ptr,  # [M] float32: m
    sum_ptr,  # [M] float32: l
    row_grad_ptr,  # [M] float32, ROW_GRAD: gradient of each row's loss
    dbias_ptr,  # [⌈M / TILE_M⌉, width] float32, BIAS: column sums of G over each tile of rows
    stride_m,
    stride_gm,
    num_rows,
    vocab_size,
    width,
    ignore_index,
    label_smoothing,
    z_loss,
    ROW_GRAD: tl.constexpr,
    BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program handles TILE_M rows of BLOCK_N columns, so that the column sums stay in registers.
    num_blocks = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // num_blocks
    columns = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    exists = columns < width  # [BLOCK_N]
    in_vocab = columns < vocab_size  # [BLOCK_N]
    column_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)  # [BLOCK_N]
    for start in range(tile * TILE_M, tl.minimum(tile * TILE_M + TILE_M, num_rows), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=ignore_index)  # [BLOCK_M]
        labelled = label != ignore_index  # [BLOCK_M]
        row_max = tl.load(max_ptr + rows, mask=labelled, other=0.0)  # [BLOCK_M]
        row_sum = tl.load(sum_ptr + rows, mask=labelled, other=1.0)  # [BLOCK_M]
        long_rows = tl.cast(rows, tl.int64)[:, None]  # [BLOCK_M, 1]
        mask = labelled[:, None] & exists[None, :]  # [BLOCK_M, BLOCK_N]
        x = tl.load(logits_ptr + long_rows * stride_m + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        is_label = columns[None, :] == label[:, None]  # [BLOCK_M, BLOCK_N]
        z_slope = 2.0 * z_loss * (row_max + tl.log(row_sum))  # [BLOCK_M]
        g = gradient_of_logits(
            x, is_label, row_max[:, None], row_sum[:, None], z_slope[:, None], vocab_size, label_smoothing
        )  # [BLOCK_M, BLOCK_N]
        if ROW_GRAD:
            g *= tl.load(row_grad_ptr + rows, mask=labelled, other=0.0)[:, None]
        g = tl.where(labelled[:, None] & in_vocab[None, :], g, 0.0)
        out = dlogits_ptr + long_rows * stride_gm + columns[None, :]  # [BLOCK_M, BLOCK_N]
        tl.store(out, g.to(dlogits_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & exists[None, :])
        column_sum += tl.sum(g, axis=0)
    if BIAS:
        tl.store(dbias_ptr + tl.cast(tile, tl.int64) * width + columns, column_sum, mask=exists)


def launch_statistics(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, m, l: float32 [M]; correct: int32 [M]) of the first vocab_size columns of logits [M, width]."""
    rows = logits.shape[0]
    losses, row_max, row_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    correct = labels.new_empty(rows, dtype=torch.int32)
    num_warps = 8
    if rows:
        # 64 lanes per warp: each thread has two loads of 16 bytes in flight.
        cross_entropy_forward[(rows,)](
            logits, labels, losses, row_max, row_sum, correct, logits.stride(0), vocab_size, logits.shape[1],
            ignore_index, label_smoothing, z_loss, SMOOTHING=label_smoothing > 0, LANES=64 * num_warps,
            VECTOR=16 // logits.element_size(), num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return losses, row_max, row_sum, correct


def launch_gradient(
    logits: Tensor,
    dlogits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_grad: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    need_bias: bool,
) -> Tensor | None:
    """Writes G into ``dlogits``, which may be ``logits``; returns its column sums [width] if ``need_bias``."""
    rows, width = logits.shape
    tiles = triton.cdiv(rows, TILE_M)
    partial_sums = logits.new_empty(tiles, width, dtype=torch.float32) if need_bias else None
    if rows:
        cross_entropy_backward[(tiles * triton.cdiv(width, BLOCK_N),)](
            logits, dlogits, labels, row_max, row_sum, row_grad, partial_sums, logits.stride(0), dlogits.stride(0),
            rows, vocab_size, width, ignore_index, label_smoothing, z_loss, ROW_GRAD=row_grad is not None,
            BIAS=need_bias, TILE_M=TILE_M, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return partial_sums.sum(0) if partial_sums is not None else None


def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_statistics(logits, labels, logits.shape[1], ignore_index, label_smoothing, z_loss)[:3]


def _backward(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    launch_gradient(
        logits, dlogits, labels, row_max, row_sum, dlosses.contiguous(), logits.shape[1], ignore_index,
        label_smoothing, z_loss, need_bias=False,
    )  # fmt: skip
    return dlogits


_forward_op = register(
    "cross_entropy(Tensor logits, Tensor labels, SymInt ignore_index, float label_smoothing, float z_loss) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    lambda logits, *_: tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3)),
)
_backward_op = register(
    "cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor labels, Tensor row_max, Tensor row_sum, "
    "SymInt ignore_index, float label_smoothing, float z_loss) -> Tensor",
    _backward,
    lambda dlosses, logits, *_: logits.new_empty(logits.shape),
)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *options: Any) -> Tensor:
        losses, row_max, row_sum = _forward_op(logits, labels, *options)
        ctx.save_for_backward(logits, labels, row_max, row_sum)
        ctx.options = options
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return _backward_op(dlosses, *ctx.saved_tensors, *ctx.options), None, None, None, None


def row_losses(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> Tensor:
    """Losses, float32 [M], of logits [M, V] with last stride 1 and labels int64 [M]."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _RowLosses.apply(logits, labels, ignore_index, label_smoothing, z_loss)
    return _forward_op(logits, labels, ignore_index, label_smoothing, z_loss)[0]


def refuse_second_derivative() -> None:
    """Raises under create_graph=True: only then is grad mode on in a backward.

    Raises:
        RuntimeError: create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the Triton cross entropy has no second derivative: drop create_graph=True, or compute the loss "
            'within use_backend("reference")'
        )


def relative_to_largest(dlosses: Tensor) -> tuple[Tensor, Tensor]:
    """(dlosses / factor, factor []) with entries of at most 1. The factor is a power of two, so nothing is rounded."""
    exponent = torch.frexp(F.pad(dlosses.abs(), (0, 1)).amax()).exponent  # padded: amax of no rows is an error
    factor = torch.ldexp(dlosses.new_ones(()), exponent)
    return dlosses / factor, factor
