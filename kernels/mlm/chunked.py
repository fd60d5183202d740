"""The masked-LM loss in least time: cuBLAS writes logits, which are turned into their gradient in place.

The forward makes the gradients, chunk by chunk of rows, and the backward scales them; why is at the top of
``mlm_loss.py``. The logits are written once, in the activations' dtype; one kernel reads (m, l, loss, arg max) off each
row and a second turns the logits into G, leaving column sums of G (db) behind; two more products make dH and dW.

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

from ..backend import tl, triton
from .softmax_rows import launch_gradient, launch_statistics, refuse_second_derivative, relative_to_largest

# Most bytes of logits alive at once. A chunk of C rows costs 12 VH bytes to add up dW beside its 6 CHV FLOPs, on an
# H200 367 / C of its time: with 2 GiB, nothing for BERT's vocabulary up to 35k rows, 11 % for 256k words.
LOGITS_BYTES = 2 * 2**30
CHUNK_TILE = 128  # rows of a matrix product's tile

FP16_SHRINK = 1 / 64


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


def most_rows(width: int, element_size: int) -> int:
    """Rows of logits that LOGITS_BYTES hold, in whole tiles."""
    return max(LOGITS_BYTES // (width * element_size) // CHUNK_TILE * CHUNK_TILE, CHUNK_TILE)


def chunk_rows(rows: int, width: int, element_size: int) -> int:
    """Rows of logits to have at once: all, or equal parts within LOGITS_BYTES, in whole tiles."""
    most = most_rows(width, element_size)
    if rows <= most:
        return rows
    return triton.cdiv(triton.cdiv(rows, triton.cdiv(rows, most)), CHUNK_TILE) * CHUNK_TILE


@torch.library.custom_op("fusebert::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
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
    chunk = chunk_rows(rows, width, hidden.element_size())
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
        losses[part], row_max, row_sum, right = launch_statistics(
            logits, y, vocab_size, ignore_index, label_smoothing, z_loss
        )
        correct += right.sum()
        if not (need_hidden or need_weight or need_bias):
            continue
        column_sums = launch_gradient(
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


@linear_cross_entropy.register_fake
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
def scaled(x: Tensor, factor: Tensor, constant: float) -> Tensor:
    """x · factor · constant, the factor ([] float32) never rounded to x's dtype, as torch.mul would."""
    out = torch.empty_like(x)
    if x.numel():
        _scale[(triton.cdiv(x.numel(), 4096),)](x, out, factor, constant, x.numel(), BLOCK=4096, num_warps=8)
    return out


@scaled.register_fake
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


def _linear_cross_entropy_backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    if d_loss is None:
        return (None,) * 12
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    factor = d_loss
    if ctx.per_row:
        hidden, weight, bias, labels = ctx.saved_tensors
        row_grad, factor = relative_to_largest(d_loss)
        gradients = linear_cross_entropy(
            hidden, weight, bias, labels, row_grad, *ctx.options, False, need_hidden, need_weight, need_bias
        )[2:]
    else:
        gradients = ctx.saved_tensors
    d_hidden, d_weight, d_bias = gradients
    unshrink = 1 / FP16_SHRINK if d_weight.dtype == torch.float16 else 1.0
    return (
        scaled(d_hidden, factor, 1.0) if need_hidden else None,
        scaled(d_weight, factor, unshrink) if need_weight else None,
        (d_bias * factor).to(ctx.bias_dtype) if need_bias else None,
        *(None,) * 9,
    )


linear_cross_entropy.register_autograd(_linear_cross_entropy_backward, setup_context=_save_gradients)


__all__ = ["linear_cross_entropy"]
