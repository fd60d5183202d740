"""Masked-LM loss: the decoder's matrix product and its cross entropy in one operator, in bounded memory.

Only the M rows with a label count. With x = hWᵀ + b the logits of a row (V of them), y its label, ε the label
smoothing and ζ the weight of the z-loss (Chowdhery et al. 2022, PaLM, §5):

    forward     m = max_w x_w      l = Σ_w exp(x_w − m)      lse = m + log l      p_w = exp(x_w − m) / l
                loss = lse − (1 − ε) x_y − (ε / V) Σ_w x_w + ζ lse²
    backward    G_w = (1 + 2ζ lse) p_w − (1 − ε)[w = y] − ε / V            dloss / dx_w, at most 1 + 2ζ lse in size
                dH = G W      dW = Gᵀ H      db = Σ_rows G

The logits are written once, by cuBLAS, in the activations' dtype; one kernel reads (m, l, loss, arg max) off each row
and a second turns the logits into G in place, leaving column sums of G (db) behind. Softmax arithmetic is fp32.
Three designs, at 2 bytes an element, with the passes over memory that the products themselves do not make:

    (a) logits kept for the backward; recomputed there where they exceed the budget     6 (8) MHV FLOPs, 6 MV bytes
    (b) fused tiles, no logits: dH and dW each recompute theirs                        10 MHV FLOPs, 0 bytes
    (c) the forward makes the gradients, the backward scales them                       6 MHV FLOPs,
        by the loss's own gradient                                                            6 MV + 4 VH + 4 MH bytes
    where logits come in chunks, dW is summed over them in fp32, (a) and (c):           12 VH bytes a chunk, 6 VH once

    computed for one H200 (790 TFLOP/s, 4.3 TB/s), M = 9830 (15 % of 65k tokens), H = 768; workspace beside:
                                       V = 30528             V = 131072            V = 262144
    the three products alone           1.75 ms               7.5 ms                15.0 ms
    (a)                                2.17 ms, 0.6 GiB      12.5 ms, 1.8 GiB      25.6 ms, 2.8 GiB
    (b)                                2.92 ms, none         12.5 ms, none         25.1 ms, none
    (c)                                2.20 ms, 0.6 GiB      10.1 ms, 1.8 GiB      20.8 ms, 2.8 GiB
    F.linear + F.cross_entropy, bf16   2.73 ms, 1.7 GiB      11.7 ms, 7.2 GiB      23.4 ms, 14.4 GiB  (14 MV bytes)

Per logit the products cost 6H FLOPs, 5.8 ps at H = 768; the six bytes of (a) and (c) 1.4 ps; the 4H FLOPs that (b)
does again 3.9 ps, or 1.9 ps where dH and dW share them, which takes atomics. At BERT's width a logit is cheaper to move
than to make; below H = 275 that turns round. (a) and (c) tie where one chunk suffices; where it does not, only (c)
stays at 6 MHV, and it gives the logits' memory back before the backward begins: hence (c). Its price: a forward
whose gradient nobody wants belongs under ``torch.no_grad``. reduction="none" has one upstream gradient a row, so there
the backward computes everything again (8 MHV). Six bytes a logit bound the whole to 1.24 × the products at H = 768 and
1.05 × at H = 4096; two of them would go if the first product's epilogue took the row statistics.

Traps this file minds:
- G is stored unscaled, entries of order 1: with the mean's 1/M inside, most of it would vanish in fp16. Upstream
  gradients enter at the end, in fp32. fp16's dW, a sum over M rows, is kept at 1/64 until then, or it could overflow.
- Tensor cores want sizes and row strides in whole 16 bytes, better 128 (NVIDIA's matrix-multiplication guide), and V
  is the contiguous axis of G. A vocabulary that is no multiple of 8, such as BERT's 30522, is padded to one of 64 with
  zero rows on a copy of W (4 VH bytes, 1 %); padding takes no part in the softmax and its G is zero. Not yet measured
  on a GPU, nor is the alternative: aligned row strides, ragged sizes.
- The bias is added by the matrix product's epilogue, rounded to the activations' dtype as in ``F.linear``: the kernels
  would read 4 bytes of it with every 2 of logits. cuBLAS fuses it only into a contiguous result; the buffer is one.
- Same inputs, same bits: no atomics; every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._triton import tl, triton
from .backend import KERNEL_DTYPES, choose_backend

# Most bytes of logits alive at once. A chunk of C rows costs 12 VH bytes to add up dW beside its 6 CHV FLOPs, on an
# H200 367 / C of its time: with 2 GiB, nothing for BERT's vocabulary up to 35k rows, 11 % for 256k words.
LOGITS_BYTES = 2 * 2**30
CHUNK_TILE = 128  # rows of a matrix product's tile

LOWEST = tl.constexpr(-3.4e38)  # below every logit but −inf, and finite: a maximum of nothing from which no NaN arises
NO_COLUMN = tl.constexpr(2**31 - 1)
FP16_SHRINK = 1 / 64

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
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    loss = log_sum + (1.0 - label_smoothing) * (row_max - x_label) + z_loss * lse * lse
    if SMOOTHING:
        loss += label_smoothing * (row_max - tl.sum(tl.sum(x_sum, axis=1), axis=0) / vocab_size)
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
    smooth = label_smoothing / vocab_size
    column_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(tile * TILE_M, tl.minimum(tile * TILE_M + TILE_M, num_rows), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=ignore_index)
        labelled = label != ignore_index
        row_max = tl.load(max_ptr + rows, mask=labelled, other=0.0)
        row_sum = tl.load(sum_ptr + rows, mask=labelled, other=1.0)
        z_slope = 2.0 * z_loss * (row_max + tl.log(row_sum))
        long_rows = tl.cast(rows, tl.int64)[:, None]
        mask = labelled[:, None] & exists[None, :]
        x = tl.load(logits_ptr + long_rows * stride_m + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        p = tl.exp(x - row_max[:, None]) * (1.0 / row_sum)[:, None]
        # p − target first: where the two are close their difference is exact, and the z-loss adds to that.
        g = p - tl.where(columns[None, :] == label[:, None], 1.0 - label_smoothing + smooth, smooth)
        g += z_slope[:, None] * p
        if ROW_GRAD:
            g *= tl.load(row_grad_ptr + rows, mask=labelled, other=0.0)[:, None]
        g = tl.where(labelled[:, None] & in_vocab[None, :], g, 0.0)
        out = grad_ptr + long_rows * stride_gm + columns[None, :]
        tl.store(out, g.to(grad_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & exists[None, :])
        column_sum += tl.sum(g, axis=0)
    if BIAS:
        tl.store(bias_grad_ptr + tl.cast(tile, tl.int64) * width + columns, column_sum, mask=exists)


@triton.jit
def _scale(
    x_ptr,  # [n]
    out_ptr,  # [n]
    factor_ptr,  # [1] float32
    constant,
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)
    tl.store(out_ptr + offsets, (x * (tl.load(factor_ptr) * constant)).to(out_ptr.dtype.element_ty), mask=offsets < n)


# ----------------------------------------------------------------------------------------------------------- launchers

TILE_M, BLOCK_M, BLOCK_N = 64, 4, 1024


def _launch_statistics(
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


def _launch_gradient(
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


def _chunk_rows(rows: int, width: int, element_size: int) -> int:
    """Rows of logits to have at once: all, or equal parts within LOGITS_BYTES, in whole tiles."""
    most = max(LOGITS_BYTES // (width * element_size) // CHUNK_TILE * CHUNK_TILE, CHUNK_TILE)
    if rows <= most:
        return rows
    return triton.cdiv(triton.cdiv(rows, triton.cdiv(rows, most)), CHUNK_TILE) * CHUNK_TILE


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("fusebert::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    per_row: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, count of right rows, and the gradients of Σ row_grad · loss (row_grad None: ones), each where needed.

    hidden: [M, H]. weight: [V, H]. bias: [V] or None. labels: int64 [M]. row_grad: float32 [M].
    Returns loss (float32 [M] if per_row, else its sum, []), correct (int64 []), dH [M, H], dW [V, H] (in fp16,
    FP16_SHRINK · dW), db float32 [V]; a gradient that is not needed has no elements.
    """
    rows, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    width = vocab_size if vocab_size % 8 == 0 else triton.cdiv(vocab_size, 64) * 64
    if width > vocab_size:
        weight = F.pad(weight, (0, 0, 0, width - vocab_size))
    if bias is not None:
        bias = F.pad(bias.to(hidden.dtype), (0, width - vocab_size))
    chunk = _chunk_rows(rows, width, hidden.element_size())
    buffer = hidden.new_empty(chunk, width)
    losses = hidden.new_empty(rows, dtype=torch.float32)
    correct = labels.new_zeros(())
    d_hidden = hidden.new_empty(rows if need_hidden else 0, hidden_size)
    one_product = 0 < chunk == rows  # then dW is the product itself, else fp32 in which the chunks' products add up
    d_weight = hidden.new_zeros(width if need_weight and not one_product else 0, hidden_size, dtype=torch.float32)
    d_bias = hidden.new_zeros(width if need_bias else 0, dtype=torch.float32)
    shrink = FP16_SHRINK if hidden.dtype == torch.float16 else 1.0

    for start in range(0, rows, max(chunk, 1)):
        part = slice(start, min(start + chunk, rows))
        h, y = hidden[part], labels[part]
        logits = buffer[: h.shape[0]]
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)
        losses[part], row_max, row_sum, right = _launch_statistics(
            logits, y, vocab_size, ignore_index, label_smoothing, z_loss
        )
        correct += right.sum()
        if not (need_hidden or need_weight or need_bias):
            continue
        column_sums = _launch_gradient(
            logits, logits, y, row_max, row_sum, None if row_grad is None else row_grad[part], vocab_size, ignore_index,
            label_smoothing, z_loss, need_bias,
        )  # fmt: skip
        if column_sums is not None:
            d_bias += column_sums
        if need_hidden:
            torch.mm(logits, weight, out=d_hidden[part])
        if need_weight:
            product = torch.mm(logits.t(), h if shrink == 1.0 else h * shrink)
            d_weight = product if one_product else d_weight.add_(product)
    d_weight = d_weight[:vocab_size].to(weight.dtype)
    return losses if per_row else losses.sum(), correct, d_hidden, d_weight, d_bias[:vocab_size]


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    per_row: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    return (
        hidden.new_empty((rows,) if per_row else (), dtype=torch.float32),
        labels.new_empty(()),
        hidden.new_empty(rows if need_hidden else 0, hidden_size),
        weight.new_empty(vocab_size if need_weight else 0, hidden_size),
        hidden.new_empty(vocab_size if need_bias else 0, dtype=torch.float32),
    )


@torch.library.custom_op("fusebert::scale", mutates_args=())
def _scaled(x: Tensor, factor: Tensor, constant: float) -> Tensor:
    """x · factor · constant, the factor ([] float32) never rounded to x's dtype, as torch.mul would."""
    out = torch.empty_like(x)
    if x.numel():
        _scale[(triton.cdiv(x.numel(), 4096),)](x, out, factor, constant, x.numel(), BLOCK=4096, num_warps=8)
    return out


@_scaled.register_fake
def _(x: Tensor, factor: Tensor, constant: float) -> Tensor:
    return torch.empty_like(x)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels = inputs[:4]
    ctx.options = inputs[5:8]
    ctx.per_row = inputs[8]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.per_row:
        ctx.save_for_backward(hidden, weight, bias, labels)
    else:
        ctx.save_for_backward(*output[2:])


def _refuse_second_derivative() -> None:
    """Grad mode is on in a backward only under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the Triton cross entropy has no second derivative: drop create_graph=True, or compute the loss "
            'within use_backend("reference")'
        )


def _linear_cross_entropy_backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    if d_loss is None:
        return (None,) * 12
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    factor = d_loss
    if ctx.per_row:
        hidden, weight, bias, labels = ctx.saved_tensors
        # Relative to the largest row, so that G stays of order 1; by a power of two, which rounds nothing. The padding
        # is for a batch without rows.
        exponent = torch.frexp(F.pad(d_loss.abs(), (0, 1)).amax()).exponent
        factor = torch.ldexp(d_loss.new_ones(()), exponent)
        row_grad = d_loss / factor
        gradients = _linear_cross_entropy(
            hidden, weight, bias, labels, row_grad, *ctx.options, False, need_hidden, need_weight, need_bias
        )[2:]
    else:
        gradients = ctx.saved_tensors
    d_hidden, d_weight, d_bias = gradients
    unshrink = 1 / FP16_SHRINK if d_weight.dtype == torch.float16 else 1.0
    return (
        _scaled(d_hidden, factor, 1.0) if need_hidden else None,
        _scaled(d_weight, factor, unshrink) if need_weight else None,
        (d_bias * factor).to(ctx.bias_dtype) if need_bias else None,
        *(None,) * 9,
    )


_linear_cross_entropy.register_autograd(_linear_cross_entropy_backward, setup_context=_save_gradients)


@torch.library.custom_op("fusebert::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [M, V], last stride 1; labels int64 [M] → losses, m, l: float32 [M]."""
    return _launch_statistics(logits, labels, logits.shape[1], ignore_index, label_smoothing, z_loss)[:3]


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
    _launch_gradient(
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
    _refuse_second_derivative()
    d_logits = None if d_loss is None else _cross_entropy_backward(d_loss, *ctx.saved_tensors, *ctx.options)
    return d_logits, None, None, None, None


_cross_entropy.register_autograd(_cross_entropy_gradient, setup_context=_save_logits)


# -------------------------------------------------------------------------------------------------------------- checks


def _check_options(reduction: str, label_smoothing: float, z_loss: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be a weight of 0 or more; got {z_loss}")


def _check_rows(name: str, x: Tensor, labels: Tensor) -> None:
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


def _check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}], V at least 1; got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden and weight must have one dtype; got hidden {hidden.dtype}, weight {weight.dtype}: "
            "cast the weight, weight.to(hidden.dtype)"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on hidden's device, {hidden.device}; got {weight.device}")
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one entry for each row of weight; got {tuple(bias.shape)}")
    if bias.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"bias must be {hidden.dtype}, as hidden is, or float32; got {bias.dtype}")
    if bias.device != hidden.device:
        raise ValueError(f"bias must be on hidden's device, {hidden.device}; got {bias.device}")


def _check_labels(labels: Tensor, vocab_size: int, ignore_index: int, max_labels: int | None) -> None:
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


def _compact(hidden: Tensor, labels: Tensor, ignore_index: int, max_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The labelled rows, in order, in max_labels slots: no size depends on a value, so nothing waits for the device.

    Returns (hidden [M, H], row 0 again in spare slots; labels [M], there ignore_index; int64 [T]: the slot of each
    labelled row).
    Where the rows do not fit, every label becomes one outside any vocabulary: the loss is NaN.
    """
    labelled = labels != ignore_index
    slots = labelled.cumsum(0) - 1
    # Rows without a slot are written to one more slot at the end, which is cut off.
    target = torch.where(labelled, slots, max_labels).clamp(max=max_labels)
    rows = labels.new_zeros(max_labels + 1).scatter(0, target, torch.arange(labels.shape[0], device=labels.device))
    kept = labels.new_full((max_labels + 1,), ignore_index).scatter(0, target, labels)
    overflow = labelled.sum() > max_labels
    kept = torch.where(overflow, torch.iinfo(torch.int64).min, kept[:max_labels])
    return hidden.index_select(0, rows[:max_labels]), kept, slots.clamp(0, max_labels - 1)


def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: bool = False,
    max_labels: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the decoder's logits, hidden @ weightᵀ + bias, over the rows that have a label.

    Devlin et al. 2018, §3.1: L = −(1/M) Σ log p(token), in nats. As ``F.cross_entropy(F.linear(hidden, weight, bias),
    labels)``, plus ``z_loss`` · lse² a row, but the logits exist in hidden's dtype only, 2 GiB of them at most.

    Args:
        hidden: [.., H], e.g. [T, H] or [B, N, H], bfloat16, float16 or float32 (float64 runs the reference).
        weight: [V, H], hidden's dtype; any V. Tied to the word embeddings in BERT.
        bias: [V], hidden's dtype or float32, or None. float32 is rounded to hidden's dtype; its gradient is not.
        labels: int64 [..], the token of each row, or ``ignore_index``.
        reduction: "mean" over the labelled rows, "sum", or "none". Without a labelled row the loss is 0, and so is
            every gradient.
        label_smoothing: ε: the target is (1 − ε) · onehot + ε / V (Szegedy et al. 2016).
        z_loss: weight of lse², which keeps the softmax's denominator near 1 (0: none; PaLM used 1e-4).
        return_accuracy: also return how many labelled rows have their label as arg max of the logits as computed, in
            hidden's dtype; of equal logits the first counts, as in ``torch.argmax``.
        max_labels: an upper bound M on the labelled rows. Given, those rows alone meet the vocabulary, gathered without
            waiting for the device, every shape constant: a CUDA graph can hold the call. None: rows are used as they
            are, which is right when the caller has gathered them; an unlabelled row then costs its matrix products.

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or the shape of labels, 0 where ignored, for "none".
        With ``return_accuracy`` (loss, correct), correct an int64 0-dim tensor.

    The gradient is computed in the forward, unless grad mode is off or nothing asks for it; it has no gradient itself
    (create_graph=True is a RuntimeError). Triton runs for CUDA tensors. There a label outside 0 … V − 1 makes its row's
    loss NaN, and more labelled rows than ``max_labels`` make every row's: reading the labels to raise an error would
    stall the GPU at every step. Under torch.compile the reference (CPU) does not skip unlabelled rows either.

    Raises:
        ValueError: a shape, device, reduction, label_smoothing, z_loss or max_labels that does not fit; on the CPU,
            also a label out of range, or more labelled rows than ``max_labels``.
        TypeError: a dtype that does not fit.
    """
    _check_options(reduction, label_smoothing, z_loss)
    _check_rows("hidden", hidden, labels)
    _check_decoder(hidden, weight, bias)
    if max_labels is not None and max_labels < 1:
        raise ValueError(f"max_labels must be at least 1, or None; got {max_labels}")
    backend = choose_backend(hidden)
    shape, vocab_size = labels.shape, weight.shape[0]
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    if (backend == "reference" or not hidden.is_cuda) and not torch.compiler.is_compiling():
        _check_labels(labels, vocab_size, ignore_index, max_labels)
    if backend == "reference":
        loss, correct = reference.masked_lm_loss(
            hidden,
            weight,
            None if bias is None else bias.to(hidden.dtype),
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
    else:
        row_labels, slots = labels, None
        if max_labels is not None and max_labels < labels.shape[0]:
            hidden, row_labels, slots = _compact(hidden, labels, ignore_index, max_labels)
        per_row = reduction == "none"
        wanted = [
            x is not None and torch.is_grad_enabled() and not per_row and x.requires_grad
            for x in (hidden, weight, bias)
        ]
        loss, correct, *_ = _linear_cross_entropy(
            hidden, weight, bias, row_labels, None, ignore_index, label_smoothing, z_loss, per_row, *wanted
        )
        if per_row and slots is not None:
            loss = torch.where(labels != ignore_index, loss.index_select(0, slots), 0.0)
        if reduction == "mean":
            loss = loss / (labels != ignore_index).sum().clamp(min=1)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, correct) if return_accuracy else loss


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
    _check_options(reduction, label_smoothing, z_loss)
    _check_rows("logits", logits, labels)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column; got {tuple(logits.shape)}")
    backend = choose_backend(logits)
    rows, row_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).contiguous()
    if (backend == "reference" or not logits.is_cuda) and not torch.compiler.is_compiling():
        _check_labels(row_labels, logits.shape[-1], ignore_index, None)
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


__all__ = ["cross_entropy", "masked_lm_loss"]
