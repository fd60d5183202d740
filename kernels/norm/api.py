"""`layernorm`, `rmsnorm` and `dropout_add_layernorm`, and their modules."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import reference
from ..backend import choose_backend
from ..checks import (
    check_dtype,
    check_eps,
    check_has_columns,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_same_shape,
    check_seed,
    check_tensor,
    check_vector,
)
from ..dropout import dropout_mask, resolve_seed
from ..row_norm import MAX_HIDDEN_SIZE
from .op import DropoutAddLayerNorm, forward_op


def _check(
    x: Tensor,
    residual: Tensor | None,
    seed: int | Tensor | None,
    p: float,
    eps: float,
    **vectors: Tensor | None,
) -> None:
    check_has_columns("x", x, "H")
    check_dtype("x", x)
    if residual is not None:
        check_same_shape("residual", residual, "x", x)
        check_same_dtype("residual", residual, "x", x)
        check_same_device("residual", residual, "x", x)
    for name, vector in vectors.items():
        check_vector(name, vector, x.shape[-1], "x's last axis", "x", x)
    check_eps(eps)
    check_probability("p", p)
    check_seed(seed, x.device)


def _run_reference(
    x: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: int | Tensor | None,
    p: float,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """(y, s) by PyTorch's operators, in the kernels' dtypes."""
    mask = None
    if p > 0.0 and seed is not None:
        rows = x.numel() // max(x.shape[-1], 1)
        mask = dropout_mask(p, resolve_seed(seed, x.device), rows, x.shape[-1], x.device).view(x.shape)
    s = reference.dropout_add(x, residual, linear_bias=linear_bias, p=p, dropout_mask=mask)
    y = reference.layernorm(s, weight, bias, eps=eps) if centred else reference.rmsnorm(s, weight, eps=eps)
    return y.to(x.dtype), s  # a float32 weight or autocast widens y


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    seed: int | Tensor | None = None,
    p: float = 0.0,
    eps: float,
    centred: bool = True,
    return_sum: bool = False,
) -> Any:
    _check(x, residual, seed, p, eps, linear_bias=linear_bias, weight=weight, bias=bias)
    tensors = (x, linear_bias, residual, weight, bias)
    if choose_backend(x) == "reference" or x.shape[-1] > MAX_HIDDEN_SIZE:
        y, s = _run_reference(*tensors, seed, p, eps, centred)
        return (y, s) if return_sum else y
    seed = resolve_seed(seed, x.device) if p > 0.0 else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return DropoutAddLayerNorm.apply(return_sum, *tensors, seed, p, eps, centred)
    y, s, _, _ = forward_op(*tensors, seed, p, eps, centred, return_sum)
    return (y, s) if return_sum else y


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over the last axis, var the mean squared deviation (Ba et al. 2016).

    Statistics are float32 and the result has x's dtype, under autocast too (where ``F.layer_norm`` returns float32).
    A second derivative of the Triton path raises RuntimeError.

    Args:
        x: [.., H], any strides, bfloat16, float16 or float32. float64, H > 16384 and CPU tensors run the reference.
        weight, bias: [H] of x's dtype or float32, or None for 1 and 0.
        eps: added to the variance; BERT uses 1e-12.

    Returns:
        [.., H] of x's dtype, contiguous.

    Raises:
        ValueError: a shape or a device does not fit, or eps is negative.
        TypeError: a dtype is not allowed.
    """
    return _apply(x, None, weight, bias, eps=eps)


def rmsnorm(x: Tensor, weight: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """x / √(⟨x²⟩ + eps) · weight over the last axis (Zhang and Sennrich 2019).

    Args, Returns, Raises: as `layernorm`.
    """
    return _apply(x, None, weight, None, eps=eps, centred=False)


@overload
def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    linear_bias: Tensor | None = ...,
    eps: float = ...,
    p: float = ...,
    seed: int | Tensor | None = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...


@overload
def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    linear_bias: Tensor | None = ...,
    eps: float = ...,
    p: float = ...,
    seed: int | Tensor | None = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    eps: float = 1e-5,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """layernorm(residual + Dropout(x + linear_bias)): the end of a post-LN sub-layer (Vaswani et al. 2017, 5.4).

    Args:
        x, residual: [.., H] of one shape, dtype and device, as x in `layernorm`. Under autocast a residual of another
            dtype is allowed: the wider dtype of the two is that of the sum and the result.
        weight, bias, eps: as in `layernorm`.
        linear_bias: [H] of x's dtype or float32, the bias of the linear layer that computed x. Adding it here saves
            that layer's backward one pass over x's gradient.
        p: probability that an element of x is dropped. The others are scaled by 1 / (1 − p).
        seed: selects the mask. An int, or an int64 tensor of one element on x's device, gives the mask of
            `dropout_mask` (rows in the order of x) on every backend and device; on the reference path that is slow.
            None draws a seed from torch's generator, which ``torch.manual_seed`` controls.
        return_sum: also return s = residual + Dropout(x + linear_bias), which a pre-LN model needs.

    Returns:
        y [.., H] of x's dtype, contiguous; with return_sum (y, s).

    Raises:
        ValueError: a shape or a device does not fit, eps is negative, p is outside [0, 1), or a seed tensor has more
            than one element.
        TypeError: a dtype is not allowed, or seed has another type.
    """
    check_tensor("x", x)
    check_tensor("residual", residual)
    if residual.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    return _apply(x, residual, weight, bias, linear_bias=linear_bias, seed=seed, p=p, eps=eps, return_sum=return_sum)


def _check_one_axis(normalized_shape: tuple[int, ...], original: str) -> None:
    if len(normalized_shape) != 1:
        raise ValueError(
            f"normalized_shape must be one axis, the last; got {tuple(normalized_shape)}: use {original}, or flatten "
            "the axes"
        )


def _check_last_axis(x: Tensor, normalized_shape: tuple[int, ...]) -> None:
    if x.shape[-1:] != normalized_shape:
        raise ValueError(f"the last axis of the input must be {normalized_shape[0]}; got shape {tuple(x.shape)}")


class FusedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over one axis, computed by `layernorm`: same arguments, parameters and ``state_dict``.

    Raises:
        ValueError: ``normalized_shape`` has more than one axis, or the input's last axis differs from it.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        _check_one_axis(self.normalized_shape, "nn.LayerNorm")

    def forward(self, input: Tensor) -> Tensor:
        _check_last_axis(input, self.normalized_shape)
        return layernorm(input, self.weight, self.bias, eps=self.eps)


class FusedRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over one axis, computed by `rmsnorm`: same arguments, parameters and ``state_dict``.

    Raises:
        ValueError: as in `FusedLayerNorm`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        _check_one_axis(self.normalized_shape, "nn.RMSNorm")

    def forward(self, x: Tensor) -> Tensor:
        _check_last_axis(x, self.normalized_shape)
        # nn.RMSNorm's default is the machine epsilon of the dtype that it computes in.
        default = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return rmsnorm(x, self.weight, eps=default if self.eps is None else self.eps)


class FusedDropoutAddLayerNorm(FusedLayerNorm):
    """LayerNorm(residual + Dropout(x)), with dropout in training mode; parameters and ``state_dict`` of `nn.LayerNorm`.

    Raises:
        ValueError: as in `FusedLayerNorm`, or ``p`` is outside [0, 1).
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        p: float = 0.1,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        check_probability("p", p)
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        _check_last_axis(x, self.normalized_shape)
        p = self.p if self.training else 0.0
        return dropout_add_layernorm(x, residual, self.weight, self.bias, eps=self.eps, p=p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
