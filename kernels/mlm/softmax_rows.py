"""Cross entropy over logits that exist: row statistics in one pass, and the pass that turns logits into their gradient.

The equations are at the top of ``mlm_loss.py``, which uses both kernels on its own logits; `cross_entropy` is for a
model that has logits already. Softmax arithmetic is fp32.

    forward     reads each logit once; writes loss, m, l and whether the label is the arg max: 16 bytes a row
    backward    reads each logit once and writes its gradient, in place where the caller says so; column sums of the
                gradient (db) stay behind, a float32 row for 64 rows
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backend import KERNEL_DTYPES, choose_backend, tl, triton

LOWEST = tl.constexpr(-3.4e38)  # below every logit but −inf, and finite: a maximum of nothing from which no NaN arises
NO_COLUMN = tl.constexpr(2**31 - 1)

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _online_softmax_step(
    m,
    l,
    x_sum,
    group,
    row_ptr,
    start,
    vocab_size,
    width,
    SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(m, l, x_sum, group) after columns start … start + LANES · VECTOR − 1; [LANES], x_sum [LANES, VECTOR].

    A lane owns runs of VECTOR neighbouring columns, the elements of one 16-byte load: nothing crosses threads until
    the row ends. group: first column of the first run that holds the lane's maximum.
    """
    runs = start + tl.arange(0, LANES) * VECTOR
    columns = runs[:, None] + tl.arange(0, VECTOR)[None, :]
    if CHECK:
        x = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        inside = columns < vocab_size
        if SMOOTHING:
            x_sum += tl.where(inside, x, 0.0)
        x = tl.where(inside, x, float("-inf"))
    else:
        x = tl.load(row_ptr + columns).to(tl.float32)
        if SMOOTHING:
            x_sum += x
    run_max = tl.max(x, axis=1)
    group = tl.where(run_max > m, runs, group)
    m_new = tl.maximum(m, run_max)
    # x − m before any rounding product: exact for neighbours, so logits of 1e4 lose nothing.
    l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)
    return m_new, l, x_sum, group


@triton.jit
def row_loss(m, l, label_logit, logit_sum, vocab_size, label_smoothing, z_loss, SMOOTHING: tl.constexpr):
    """A row's loss from (m, l), x_y and Σ_w x_w. log l is small beside m: differences from m are taken first."""
    log_sum = tl.log(l)
    lse = m + log_sum
    loss = log_sum + (1.0 - label_smoothing) * (m - label_logit) + z_loss * lse * lse
    if SMOOTHING:
        loss += label_smoothing * (m - logit_sum / vocab_size)
    return loss


@triton.jit
def gradient_of_logits(x, is_label, m, l, z_slope, vocab_size, label_smoothing):
    """G, elementwise: x and is_label are tiles; m, l and z_slope, 2ζ lse, broadcast to them."""
    p = tl.exp(x - m) * (1.0 / l)
    smooth = label_smoothing / vocab_size
    # p − target first: where the two are close their difference is exact, and the z-loss adds to that.
    g = p - tl.where(is_label, 1.0 - label_smoothing + smooth, smooth)
    return g + z_slope * p


@triton.jit
def _row_statistics(
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
    m = tl.full((LANES,), LOWEST, dtype=tl.float32)
    l = tl.zeros((LANES,), dtype=tl.float32)
    # Not summed over VECTOR until the end: Triton 3.7's thread-locality pass aborts on that loop.
    x_sum = tl.zeros((LANES, VECTOR), dtype=tl.float32)
    group = tl.zeros((LANES,), dtype=tl.int32)
    whole = vocab_size // (LANES * VECTOR) * (LANES * VECTOR)
    for start in range(0, whole, LANES * VECTOR):
        m, l, x_sum, group = _online_softmax_step(
            m, l, x_sum, group, row_ptr, start, vocab_size, width, SMOOTHING, LANES, VECTOR, False
        )
    if whole < vocab_size:
        m, l, x_sum, group = _online_softmax_step(
            m, l, x_sum, group, row_ptr, whole, vocab_size, width, SMOOTHING, LANES, VECTOR, True
        )

    row_max = tl.max(m, axis=0)
    row_sum = tl.sum(l * tl.exp(m - row_max), axis=0)
    # The arg max, the first of equals: the first run that holds the maximum, looked at once more.
    columns = tl.min(tl.where(m == row_max, group, NO_COLUMN - VECTOR), axis=0) + tl.arange(0, VECTOR)
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    arg_max = tl.min(tl.where(x == row_max, columns, NO_COLUMN), axis=0)

    # A label outside the vocabulary is never used as an address; it makes the row's loss and gradient NaN.
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
def _logits_gradient(
    logits_ptr,  # [M, width]
    grad_ptr,  # [M, width]: G, may be the logits themselves
    labels_ptr,  # [M] int64
    max_ptr,  # [M] float32: m
    sum_ptr,  # [M] float32: l
    row_grad_ptr,  # [M] float32, ROW_GRAD: each row's upstream gradient
    bias_grad_ptr,  # [⌈M / TILE_M⌉, width] float32, BIAS: column sums of each tile of rows
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
    # A program owns TILE_M rows of BLOCK_N columns: the column sums stay in its registers.
    num_blocks = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // num_blocks
    columns = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = columns < width
    in_vocab = columns < vocab_size
    column_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(tile * TILE_M, tl.minimum(tile * TILE_M + TILE_M, num_rows), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=ignore_index)
        labelled = label != ignore_index
        row_max = tl.load(max_ptr + rows, mask=labelled, other=0.0)
        row_sum = tl.load(sum_ptr + rows, mask=labelled, other=1.0)
        long_rows = tl.cast(rows, tl.int64)[:, None]
        mask = labelled[:, None] & exists[None, :]
        x = tl.load(logits_ptr + long_rows * stride_m + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        is_label = columns[None, :] == label[:, None]
        z_slope = 2.0 * z_loss * (row_max + tl.log(row_sum))
        g = gradient_of_logits(
            x, is_label, row_max[:, None], row_sum[:, None], z_slope[:, None], vocab_size, label_smoothing
        )
        if ROW_GRAD:
            g *= tl.load(row_grad_ptr + rows, mask=labelled, other=0.0)[:, None]
        g = tl.where(labelled[:, None] & in_vocab[None, :], g, 0.0)
        out = grad_ptr + long_rows * stride_gm + columns[None, :]
        tl.store(out, g.to(grad_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & exists[None, :])
        column_sum += tl.sum(g, axis=0)
    if BIAS:
        tl.store(bias_grad_ptr + tl.cast(tile, tl.int64) * width + columns, column_sum, mask=exists)


# ----------------------------------------------------------------------------------------------------------- launchers


TILE_M, BLOCK_M, BLOCK_N = 64, 4, 1024


def launch_statistics(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, m, l: float32 [M]; correct: int32 [M]) of logits [M, width], of which vocab_size columns are real."""
    rows = logits.shape[0]
    losses, row_max, row_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    correct = labels.new_empty(rows, dtype=torch.int32)
    vector = 16 // logits.element_size()
    num_warps = 8
    if rows:
        # Two loads of 16 bytes in flight a thread.
        _row_statistics[(rows,)](
            logits, labels, losses, row_max, row_sum, correct, logits.stride(0), vocab_size, logits.shape[1],
            ignore_index, label_smoothing, z_loss, SMOOTHING=label_smoothing > 0, LANES=64 * num_warps, VECTOR=vector,
            num_warps=num_warps,
        )  # fmt: skip
    return losses, row_max, row_sum, correct


def launch_gradient(
    logits: Tensor,
    grad: Tensor,
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
    """Writes G into ``grad`` (which may be ``logits``); returns its column sums, float32 [width], if needed."""
    rows, width = logits.shape
    tiles = triton.cdiv(rows, TILE_M)
    partial_sums = logits.new_empty(tiles, width, dtype=torch.float32) if need_bias else None
    if rows:
        _logits_gradient[(tiles * triton.cdiv(width, BLOCK_N),)](
            logits, grad, labels, row_max, row_sum, row_grad, partial_sums, logits.stride(0), grad.stride(0), rows,
            vocab_size, width, ignore_index, label_smoothing, z_loss, ROW_GRAD=row_grad is not None, BIAS=need_bias,
            TILE_M=TILE_M, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return partial_sums.sum(0) if partial_sums is not None else None


# ------------------------------------------------------------------------------------------------------------ operator


@torch.library.custom_op("fusebert::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [M, V], last stride 1; labels int64 [M] → losses, m, l: float32 [M]."""
    return launch_statistics(logits, labels, logits.shape[1], ignore_index, label_smoothing, z_loss)[:3]


@_cross_entropy.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    losses, row_max, row_sum = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, row_max, row_sum


@torch.library.custom_op("fusebert::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    d_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of Σ d_loss · losses with respect to logits, [M, V], contiguous. d_loss: float32 [M]."""
    grad = logits.new_empty(logits.shape)
    launch_gradient(
        logits, grad, labels, row_max, row_sum, d_loss.contiguous(), logits.shape[1], ignore_index, label_smoothing,
        z_loss, need_bias=False,
    )  # fmt: skip
    return grad


@_cross_entropy_backward.register_fake
def _(
    d_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, *output[1:])


def _cross_entropy_gradient(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    d_logits = None if d_loss is None else _cross_entropy_backward(d_loss, *ctx.saved_tensors, *ctx.options)
    return d_logits, None, None, None, None


_cross_entropy.register_autograd(_cross_entropy_gradient, setup_context=_save_logits)


def refuse_second_derivative() -> None:
    """Grad mode is on in a backward only under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the Triton cross entropy has no second derivative: drop create_graph=True, or compute the loss "
            'within use_backend("reference")'
        )


def relative_to_largest(d_losses: Tensor) -> tuple[Tensor, Tensor]:
    """(d_losses / factor, factor []): at most 1, so that G stays of order 1; a power of two, which rounds nothing."""
    exponent = torch.frexp(F.pad(d_losses.abs(), (0, 1)).amax()).exponent  # the padding: a batch may have no rows
    factor = torch.ldexp(d_losses.new_ones(()), exponent)
    return d_losses / factor, factor


# -------------------------------------------------------------------------------------------------------------- checks


def check_options(reduction: str, label_smoothing: float, z_loss: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be a weight of 0 or more; got {z_loss}")


def check_rows(name: str, x: Tensor, labels: Tensor) -> None:
    """x, called ``name``, is floating [.., n], and labels fit its rows."""
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}: convert them with labels.long()")
    if x.dim() < 2 or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have one entry for each row of {name}; got labels {tuple(labels.shape)}, "
            f"{name} {tuple(x.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels must be on {name}'s device, {x.device}; got {labels.device}")


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int, max_labels: int | None) -> None:
    """What only the values tell. Reading them would stall a GPU's stream: there the kernels' NaN stands in for this."""
    labelled = labels[labels != ignore_index]
    if labelled.numel() and not 0 <= int(labelled.min()) <= int(labelled.max()) < vocab_size:
        wrong = int(labelled.min()) if int(labelled.min()) < 0 else int(labelled.max())
        raise ValueError(f"labels must be in 0 … {vocab_size - 1} or ignore_index ({ignore_index}); got {wrong}")
    if max_labels is not None and labelled.numel() > max_labels:
        raise ValueError(
            f"labels has {labelled.numel()} labelled rows, more than max_labels = {max_labels}: raise max_labels"
        )


# -------------------------------------------------------------------------------------------------------------- public


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` over the last axis, plus z-loss, for a model that has its logits already.

    Reads the logits once forward, and once backward to write their gradient, in their dtype, to a tensor of its own;
    saves 8 bytes a row besides them. The equations are at the top of this file.

    Args:
        logits: [.., V], bfloat16, float16 or float32 (float64 runs the reference). Rows that start at multiples of
            16 bytes are read faster.
        labels: int64 [..], or ``ignore_index``.
        reduction, label_smoothing, z_loss: as in `masked_lm_loss`.

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or the shape of labels, 0 where ignored, for "none".
        On a GPU a label out of range makes its row's loss NaN.

    Raises:
        ValueError: a shape, device, reduction, label_smoothing or z_loss that does not fit; on the CPU, also a label
            out of range.
        TypeError: a dtype that does not fit.
    """
    check_options(reduction, label_smoothing, z_loss)
    check_rows("logits", logits, labels)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column; got {tuple(logits.shape)}")
    backend = choose_backend(logits)
    rows, row_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).contiguous()
    if (backend == "reference" or not logits.is_cuda) and not torch.compiler.is_compiling():
        check_labels(row_labels, logits.shape[-1], ignore_index, None)
    if backend == "reference":
        losses = reference.cross_entropy_rows(
            rows, row_labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
    else:
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        losses = _cross_entropy(rows, row_labels, ignore_index, label_smoothing, z_loss)[0]
    if reduction == "none":
        return losses.reshape(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (row_labels != ignore_index).sum().clamp(min=1)


__all__ = ["cross_entropy"]
