"""Rows of a matrix that is also used whole, as BERT's word embeddings are: looked up, and tied to the decoder.

    rows = W[ids], W itself        dW = dW_decoder, then dW[id_t] += drows_t

As two uses, autograd fills a second [V, H] with zeros, adds the rows there, and sums the two: 16 bytes an element of W
for T rows' worth of work. As one, the rows are added to what the decoder's product has written anyway. (Measured on
two CPU cores, BERT's vocabulary, H = 256, T = 1024: 0.4 ms beside the decoder's 36 in place of 5.4, medians of 40. The
Triton path has a backward of its own, `embed_layernorm`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _TiedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        return weight.index_select(0, ids), weight.view_as(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, drows: Tensor, dweight: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            drows = drows.masked_fill((ids == ctx.padding_idx)[:, None], 0.0)
        return dweight.index_add_(0, ids, drows), None, None


def tied_rows(weight: Tensor, ids: Tensor, padding_idx: int | None = None) -> tuple[Tensor, Tensor]:
    """(``weight[ids]`` [T, H], ``weight``) with one gradient between them. Differentiable once.

    Args:
        weight: [V, H]. ids: int64 [T]. padding_idx: the row whose lookups give it no gradient.

    The second result's gradient is added to in place: use it in products, as a decoder does, whose gradient is new.
    """
    rows, whole = _TiedRows.apply(weight, ids, padding_idx)
    return rows, whole
