"""The masked-LM loss in the least time: cuBLAS writes the logits, and a kernel turns them into their gradient in place.

The forward computes the gradients, one chunk of rows at a time, and the backward scales them. README.md says why.
Every sum has a fixed order and no atomics are used, so the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import tl, triton
from ..library import register
from .softmax_rows import launch_gradient, launch_statistics, refuse_second_derivative, relative_to_largest

# Most bytes of logits at once. Summing dweight costs 12 VH bytes per chunk of C rows, 367 / C of an H200's time: with
# 2 GiB nothing for BERT's vocabulary up to 35k rows, 11 % for 256k words.
LOGITS_BYTES = 2 * 2**30
CHUNK_TILE = 128  # rows of a matrix product's tile

FP16_SHRINK = 1 / 64  # fp16's dW, a sum over M rows, is stored at this scale: unscaled it could overflow


@triton.jit
def mlm_chunked_scale(
    x_ptr,  # [n]
    out_ptr,  # [n]
    factor_ptr,  # [1] float32
    constant,
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)  # [BLOCK]
    tl.store(out_ptr + offsets, (x * (tl.load(factor_ptr) * constant)).to(out_ptr.dtype.element_ty), mask=offsets < n)


def most_rows(width: int, element_size: int) -> int:
    """Rows of logits that fit in LOGITS_BYTES, in whole tiles."""
    return max(LOGITS_BYTES // (width * element_size) // CHUNK_TILE * CHUNK_TILE, CHUNK_TILE)


def chunk_rows(rows: int, width: int, element_size: int) -> int:
    """Rows of a chunk: all, or equal parts within LOGITS_BYTES, in whole tiles."""
    most = most_rows(width, element_size)
    if rows <= most:
        return rows
    return triton.cdiv(triton.cdiv(rows, triton.cdiv(rows, most)), CHUNK_TILE) * CHUNK_TILE


def _loss_and_gradients(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [M] int64
    row_grad: Tensor | None,  # [M] float32: gradient of each row's loss; None: ones
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    per_row: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the count of correct rows and the gradients of Σ row_grad · loss.

    Returns:
        loss (float32 [M] if per_row, else its sum, []), correct (int64 []), dhidden [M, H], dweight [V, H] (in fp16
        times FP16_SHRINK), dbias float32 [V]. A gradient that is not needed has no elements.
    """
    rows, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    # Tensor cores need row strides of 16 bytes, and V is G's contiguous axis: pad the vocabulary with zero rows.
    width = vocab_size if vocab_size % 8 == 0 else triton.cdiv(vocab_size, 64) * 64
    if width > vocab_size:
        weight = F.pad(weight, (0, 0, 0, width - vocab_size))
    if bias is not None:
        bias = F.pad(bias.to(hidden.dtype), (0, width - vocab_size))
    chunk = chunk_rows(rows, width, hidden.element_size())
    buffer = hidden.new_empty(chunk, width)
    losses = hidden.new_empty(rows, dtype=torch.float32)
    correct = labels.new_zeros(())
    dhidden = hidden.new_empty(rows if need_hidden else 0, hidden_size)
    one_product = 0 < chunk == rows  # then dweight is one product; otherwise the chunks' products are summed in fp32
    dweight = hidden.new_zeros(width if need_weight and not one_product else 0, hidden_size, dtype=torch.float32)
    dbias = hidden.new_zeros(width if need_bias else 0, dtype=torch.float32)
    shrink = FP16_SHRINK if hidden.dtype == torch.float16 else 1.0

    for start in range(0, rows, max(chunk, 1)):
        part = slice(start, min(start + chunk, rows))
        h, y = hidden[part], labels[part]
        logits = buffer[: h.shape[0]]
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)  # the product's epilogue adds the bias
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
            dbias += column_sums
        if need_hidden:
            torch.mm(logits, weight, out=dhidden[part])
        if need_weight:
            product = torch.mm(logits.t(), h if shrink == 1.0 else h * shrink)
            dweight = product if one_product else dweight.add_(product)
    dweight = dweight[:vocab_size].to(weight.dtype)
    return losses if per_row else losses.sum(), correct, dhidden, dweight, dbias[:vocab_size]


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    per_row, need_hidden, need_weight, need_bias = rest[-4:]
    return (
        hidden.new_empty((rows,) if per_row else (), dtype=torch.float32),
        labels.new_empty(()),
        hidden.new_empty(rows if need_hidden else 0, hidden_size),
        weight.new_empty(vocab_size if need_weight else 0, hidden_size),
        hidden.new_empty(vocab_size if need_bias else 0, dtype=torch.float32),
    )


def _scaled(x: Tensor, factor: Tensor, constant: float) -> Tensor:
    """x · factor · constant. The factor ([] float32) is not rounded to x's dtype, as torch.mul would."""
    out = torch.empty_like(x)
    if x.numel():
        mlm_chunked_scale[(triton.cdiv(x.numel(), 4096),)](
            x, out, factor, constant, x.numel(), BLOCK=4096, num_warps=8, enable_fp_fusion=True
        )
    return out


_loss_op = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_grad, "
    "SymInt ignore_index, float label_smoothing, float z_loss, bool per_row, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_and_gradients,
    _fake,
)
_scale_op = register(
    "scale(Tensor x, Tensor factor, float constant) -> Tensor", _scaled, lambda x, *_: torch.empty_like(x)
)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, per_row: bool, *options: Any
    ) -> tuple[Tensor, Tensor]:
        needs = [need and not per_row for need in ctx.needs_input_grad[:3]]
        loss, correct, *gradients = _loss_op(hidden, weight, bias, labels, None, *options, per_row, *needs)
        ctx.save_for_backward(*((hidden, weight, bias, labels) if per_row else gradients))
        ctx.per_row, ctx.options = per_row, options
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)  # otherwise zeros are filled in for correct's gradient, one more launch
        return loss, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if dloss is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[:3]
        if ctx.per_row:
            row_grad, factor = relative_to_largest(dloss)
            dhidden, dweight, dbias = _loss_op(*ctx.saved_tensors, row_grad, *ctx.options, False, *needs)[2:]
        else:
            (dhidden, dweight, dbias), factor = ctx.saved_tensors, dloss
        unshrink = 1 / FP16_SHRINK if dweight.dtype == torch.float16 else 1.0
        return (
            _scale_op(dhidden, factor, 1.0) if needs[0] else None,
            _scale_op(dweight, factor, unshrink) if needs[1] else None,
            (dbias * factor).to(ctx.bias_dtype) if needs[2] else None,
            *(None,) * 5,
        )


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    per_row: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """(loss, correct) of `_loss_and_gradients`; gradients are computed only for inputs that require them."""
    options = (ignore_index, label_smoothing, z_loss)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return _ChunkedLoss.apply(hidden, weight, bias, labels, per_row, *options)
    return _loss_op(hidden, weight, bias, labels, None, *options, per_row, False, False, False)[:2]
