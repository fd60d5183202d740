"""The operators `fusebert::dropout_add_layernorm` and its backward, and the autograd function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import register
from .launch import empty_backward, empty_forward, launch_backward, launch_forward


def _fake_forward(x: Tensor, linear_bias: Tensor | None, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, centred, keep = rest
    return empty_forward(x, residual, centred, keep)


def _fake_backward(
    dy: Tensor, ds_out: Tensor | None, s: Tensor, linear_bias: Any, weight: Any, bias: Any, *rest: Any
) -> tuple[Tensor, ...]:
    *_, separate, linear_bias_grad, weight_grad, bias_grad = rest
    return empty_backward(s, linear_bias, weight, bias, separate, linear_bias_grad, weight_grad, bias_grad)


forward_op = register(
    "dropout_add_layernorm(Tensor x, Tensor? linear_bias, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? seed, float p, float eps, bool centred, bool keep) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "dropout_add_layernorm_backward(Tensor dy, Tensor? ds_out, Tensor s, Tensor? linear_bias, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, float p, bool centred, bool separate, "
    "bool linear_bias_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor dx, Tensor dresidual, Tensor dlinear_bias, Tensor dweight, Tensor dbias)",
    launch_backward,
    _fake_backward,
)


class DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, return_sum: bool, *inputs: Any) -> Any:
        """inputs: those of the operator, without ``keep``."""
        x, linear_bias, residual, weight, bias, seed, ctx.p, _, ctx.centred = inputs
        y, s, mean, rstd = forward_op(*inputs, True)
        ctx.save_for_backward(x if residual is None else s, linear_bias, weight, bias, mean, rstd, seed)
        ctx.set_materialize_grads(False)  # an output without a gradient gives None, not a tensor of zeros
        return (y, s) if return_sum else y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, ds_out: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, *saved = ctx.saved_tensors
        _, _, linear_bias_grad, residual_grad, weight_grad, bias_grad, *rest = ctx.needs_input_grad
        # Without dropout x and residual have the same gradient: written once, returned twice.
        separate = ctx.p > 0.0 and residual_grad
        wanted = (linear_bias_grad, weight_grad, bias_grad)
        dy = torch.zeros_like(s) if dy is None else dy
        dx, dresidual, *sums = backward_op(dy, ds_out, s, *saved, ctx.p, ctx.centred, separate, *wanted)
        dlinear_bias, dweight, dbias = (d if want else None for d, want in zip(sums, wanted, strict=True))
        dresidual = (dresidual if separate else dx) if residual_grad else None
        return (None, dx, dlinear_bias, dresidual, dweight, dbias, *(None for _ in rest))
