"""The operators `fusebert::embed_layernorm` and its backward, and the autograd function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import register
from .launch import empty_backward, empty_forward, launch_backward, launch_forward


def _fake_forward(input_ids: Tensor, _types: Any, _positions: Any, word_weight: Tensor, *rest: Any) -> Any:
    *_, out_dtype, keep = rest
    return empty_forward(input_ids, word_weight, out_dtype, keep)


def _fake_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_backward(rest[3:8], rest[-5:])


forward_op = register(
    "embed_layernorm(Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word_weight, "
    "Tensor token_type_weight, Tensor position_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, float p, "
    "float eps, ScalarType out_dtype, bool keep) -> (Tensor y, Tensor mean, Tensor rstd)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "embed_layernorm_backward(Tensor dy, Tensor input_ids, Tensor token_type_ids, Tensor position_ids, "
    "Tensor word_weight, Tensor token_type_weight, Tensor position_weight, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor mean, Tensor rstd, Tensor? seed, float p, int? padding_idx, bool word_grad, bool token_type_grad, "
    "bool position_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor dword, Tensor dtoken_type, Tensor dposition, Tensor dweight, Tensor dbias)",
    launch_backward,
    _fake_backward,
)


class EmbedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: float, eps: float, padding_idx: int | None, out_dtype: torch.dtype, *tensors: Any) -> Any:
        """tensors: the five parameters, the three ids, the seed."""
        parameters, ids, seed = tensors[:5], tensors[5:8], tensors[8]
        y, mean, rstd = forward_op(*ids, *parameters, seed, p, eps, out_dtype, True)
        ctx.save_for_backward(*ids, *parameters, mean, rstd, seed)
        ctx.p, ctx.padding_idx = p, padding_idx
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:9]
        gradients = backward_op(dy, *ctx.saved_tensors, ctx.p, ctx.padding_idx, *wanted)
        return (*(None,) * 4, *(d if want else None for d, want in zip(gradients, wanted, strict=True)), *(None,) * 4)
