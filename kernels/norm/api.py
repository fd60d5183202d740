"""LayerNorm over the last axis, alone and after dropout and a residual, forward and backward.

A row has H elements. Z is the dropout mask (0 or 1, P(Z = 1) = 1 − p), c = 1 / (1 − p), ⟨·⟩ a mean over the row:

    forward     s = residual + c Z∘(x + a)  μ = ⟨s⟩        r = (⟨(s − μ)²⟩ + eps)^−½
                x̂ = (s − μ) r               y = w∘x̂ + b
    backward    g = w∘dy                    ds = r (g − ⟨g⟩ − x̂ ⟨g∘x̂⟩)  (+ the gradient of s, where s was returned)
                dresidual = ds              dx = c Z∘ds    dw = Σ_rows dy∘x̂      db = Σ_rows dy      da = Σ_rows dx

(Ba et al. 2016; the end of both of BERT's sub-layers, Devlin et al. 2018.) a is the bias of the linear that made x
(`linear_bias`). `layernorm` is the case s = x, and `rmsnorm` that with μ = 0, whose gradient loses ⟨g⟩.
All of it is float32 in registers. s is rounded to the activations' dtype once, where two PyTorch calls would round it,
and everything follows from the rounded s, so the backward differentiates what the forward computed.

The variance takes a second pass over the registers, never E[s²] − μ², which for a row of mean 10⁴ and deviation 1 has
no correct digit left. The same pass corrects the mean: with d = s − μ as rounded, μ += ⟨d⟩ and var = ⟨d²⟩ − ⟨d⟩² (the
corrected two-pass algorithm: Chan, Golub, LeVeque 1983), so that a constant row is not its mean's last digit over √eps.

Kept for the backward: s (where s = x: nothing new) and μ, r in float32, eH + 8 bytes a row of e-byte elements. The
backward needs x̂, H numbers a row, and r; the mask is drawn again from the seed (8 bytes in all). y, which the next
layer keeps anyway, would do in place of s only where no weight is 0, and loses |b / w| in precision elsewhere.

Bytes through HBM a row, which are also the fewest possible, and FLOPs:

                                        read            written         bytes         FLOPs
    layernorm forward                   x               y               2 eH + 8       9 H
    layernorm backward                  dy x            dx              3 eH + 8      13 H
    dropout_add_layernorm forward       x residual      y s             4 eH + 8      11 H and Philox, 20 H of integers
    dropout_add_layernorm backward      dy s            dresidual dx    4 eH + 8      14 H and Philox again
      without dropout                   dy s            ds              3 eH + 8      13 H

Above H = 8192 (4096 with dropout or linear_bias, but for whole blocks of 8192) each row of the backward is shared by
H / 8192 or H / 4096 programs at the same time, since the sums below would not fit in one's registers. Each reads all
of dy and s for the row's two means: from HBM once, from L2 as often as there are programs, 4 eH bytes at 16384.

With linear_bias nothing is added to these, and the linear's own backward loses a pass that reads dx, eH bytes a row.

Two to five operations a byte: the memory sets the time. dw, db and da are sums over all rows: each program of the
backward adds up its own rows in registers and leaves a float32 row of partial sums of each, 8 PH bytes to write and to
read for P programs (one or two a multiprocessor), which a second small kernel adds in a fixed order: no atomics, so the
same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import reference
from ..backend import choose_backend
from ..dropout import dropout_mask, resolve_seed
from .kernels import empty_gradient, kept_shapes, launch_backward, launch_forward

# In the forward a row must fit in the registers of one program; wider: the reference.
MAX_HIDDEN_SIZE = 16384


# ------------------------------------------------------------------------------------------------------------ operator
#
# define/impl with the autograd.Function outside, one boundary a call: a forward with gradient costs 7 µs of dispatch,
# through register_autograd 25 (torch 2.13, one CPU core).

_library = torch.library.Library("fusebert", "FRAGMENT")
_library.define(
    "dropout_add_layernorm(Tensor x, Tensor? linear_bias, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? seed, float p, float eps, bool centred, bool keep) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dropout_add_layernorm_backward(Tensor dy, Tensor? ds_out, Tensor s, Tensor? linear_bias, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, float p, bool centred, bool separate, "
    "bool linear_bias_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor dx, Tensor dresidual, Tensor dlinear_bias, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("dropout_add_layernorm", launch_forward, _device)
    _library.impl("dropout_add_layernorm_backward", launch_backward, _device)
_forward_op = torch.ops.fusebert.dropout_add_layernorm.default
_backward_op = torch.ops.fusebert.dropout_add_layernorm_backward.default


@torch.library.register_fake("fusebert::dropout_add_layernorm", lib=_library)
def _fake_forward(
    x: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    centred: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s_shape, mean_shape, rstd_shape = kept_shapes(x, residual, centred, keep)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in (mean_shape, rstd_shape))
    return x.new_empty(x.shape), x.new_empty(s_shape), mean, rstd


@torch.library.register_fake("fusebert::dropout_add_layernorm_backward", lib=_library)
def _fake_backward(
    dy: Tensor,
    ds_out: Tensor | None,
    s: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    centred: bool,
    separate: bool,
    linear_bias_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dlinear_bias = empty_gradient(s, linear_bias, linear_bias_grad)
    dweight, dbias = empty_gradient(s, weight, weight_grad), empty_gradient(s, bias, bias_grad)
    return s.new_empty(s.shape), s.new_empty(s.shape if separate else (0,)), dlinear_bias, dweight, dbias


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear_bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        p: float,
        eps: float,
        centred: bool,
        return_sum: bool,
    ) -> Any:
        y, s, mean, rstd = _forward_op(x, linear_bias, residual, weight, bias, seed, p, eps, centred, True)
        ctx.save_for_backward(x if residual is None else s, linear_bias, weight, bias, mean, rstd, seed)
        ctx.p, ctx.centred = p, centred
        ctx.set_materialize_grads(False)  # the gradient of an s that nobody used is None, not a tensor of zeros
        return (y, s) if return_sum else y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, ds_out: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, linear_bias, weight, bias, mean, rstd, seed = ctx.saved_tensors
        _, linear_bias_grad, residual_grad, weight_grad, bias_grad = ctx.needs_input_grad[:5]
        # Without dropout x and residual have the same gradient: written once, returned twice.
        separate = ctx.p > 0.0 and residual_grad
        dx, dresidual, dlinear_bias, dweight, dbias = _backward_op(
            torch.zeros_like(s) if dy is None else dy, ds_out, s, linear_bias, weight, bias, mean, rstd, seed, ctx.p,
            ctx.centred, separate, linear_bias_grad, weight_grad, bias_grad,
        )  # fmt: skip
        return (
            dx,
            dlinear_bias if linear_bias_grad else None,
            (dresidual if separate else dx) if residual_grad else None,
            dweight if weight_grad else None,
            dbias if bias_grad else None,
            None,
            None,
            None,
            None,
            None,
        )


# -------------------------------------------------------------------------------------------------------- public names


def _check(
    x: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [.., H]; got a scalar")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}; got {residual.dtype}: convert one of them")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}; got {residual.device}")
    for name, parameter in (("linear_bias", linear_bias), ("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, x's last; got {tuple(parameter.shape)}")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must have x's dtype {x.dtype} or float32; got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {parameter.device}")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative; got {eps}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p, the dropout probability, must be in [0, 1); got {p}")


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
    """(y, s) by PyTorch's operators, dtypes as the kernels'."""
    s = x if linear_bias is None else (x + linear_bias).to(x.dtype)
    if p > 0.0:
        mask = None
        if seed is not None:
            rows = x.numel() // max(x.shape[-1], 1)
            mask = dropout_mask(p, resolve_seed(seed, x.device), rows, x.shape[-1], x.device).view(x.shape)
        s = reference.dropout(s, p, mask)
    if residual is not None:
        s = residual + s
    dtype = x.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
    s_wide = s.to(dtype)
    y = reference.layernorm(s_wide, weight, bias, eps=eps) if centred else reference.rmsnorm(s_wide, weight, eps=eps)
    return y.to(x.dtype), s  # autocast would return float32, where the kernels keep x's dtype


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
    _check(x, linear_bias, residual, weight, bias, eps, p)
    if choose_backend(x) == "reference" or x.shape[-1] > MAX_HIDDEN_SIZE:
        y, s = _run_reference(x, linear_bias, residual, weight, bias, seed, p, eps, centred)
        return (y, s) if return_sum else y
    seed = resolve_seed(seed, x.device) if p > 0.0 else None
    tensors = (x, linear_bias, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _DropoutAddLayerNorm.apply(*tensors, seed, p, eps, centred, return_sum)
    y, s, _, _ = _forward_op(*tensors, seed, p, eps, centred, return_sum)
    return (y, s) if return_sum else y


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over the last axis, var the mean squared deviation (Ba et al. 2016).

    Statistics are float32 and the result has x's dtype, under autocast too (where ``F.layer_norm`` returns float32).
    Differentiable once: asking for second derivatives of the Triton path raises RuntimeError.

    Args:
        x: [.., H], any strides, bfloat16, float16 or float32; float64 runs the reference, and so do H > 16384 and
            tensors on the CPU.
        weight, bias: [H], each None (1 and 0), x's dtype or float32.
        eps: added to the variance; BERT's is 1e-12.

    Returns:
        [.., H], contiguous.

    Raises:
        ValueError: a shape, a device, or a negative eps.
        TypeError: a dtype.
    """
    return _apply(x, None, weight, bias, eps=eps)


def rmsnorm(x: Tensor, weight: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """x / √(⟨x²⟩ + eps) · weight over the last axis (Zhang and Sennrich 2019): `layernorm` with a mean of 0, no bias.

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
        x, residual: [.., H] of one shape, dtype and device; as `layernorm`'s x. Under autocast a residual of another
            dtype is converted to x's.
        weight, bias, eps: as `layernorm`.
        linear_bias: [H], of the linear whose product x is, x's dtype or float32: the product need not add it, and its
            backward need not read x's gradient again to sum it.
        p: the probability that an element of x is dropped; the others are scaled by 1 / (1 − p).
        seed: which mask. An int, or an int64 tensor of one element on x's device, names one for every backend and
            device: `dropout_mask`'s, whose rows are x's in order. (On the reference path that is slow: it is there to
            compare and to debug.) None draws from torch's generator, so ``torch.manual_seed`` governs.
        return_sum: also return s = residual + Dropout(x), which a pre-LN model carries on. The forward keeps it anyway.

    Returns:
        y [.., H], contiguous, of x's dtype; with return_sum (y, s).

    Raises:
        ValueError: a shape, a device, a negative eps, p outside [0, 1), or a seed tensor that is no single element.
        TypeError: a dtype, or a seed of another type.
    """
    if residual.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
    return _apply(x, residual, weight, bias, linear_bias=linear_bias, seed=seed, p=p, eps=eps, return_sum=return_sum)


def _check_one_axis(normalized_shape: tuple[int, ...], original: str) -> None:
    if len(normalized_shape) != 1:
        raise ValueError(
            f"normalized_shape must be one axis, the last; got {tuple(normalized_shape)}: use {original}, or flatten "
            "these axes"
        )


def _check_last_axis(x: Tensor, normalized_shape: tuple[int, ...]) -> None:
    if x.shape[-1:] != normalized_shape:
        raise ValueError(f"the last axis of the input must be {normalized_shape[0]}; got shape {tuple(x.shape)}")


class FusedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over one axis, by `layernorm`: same arguments, parameters and ``state_dict``.

    Raises:
        ValueError: ``normalized_shape`` has more than one axis, or the input's last axis is not it.
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
    """`nn.RMSNorm` over one axis, by `rmsnorm`: same arguments, parameters and ``state_dict``.

    Raises:
        ValueError: as `FusedLayerNorm`.
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
        if self.eps is None:  # nn.RMSNorm's default: the spacing at 1 of the numbers it computes with
            return rmsnorm(x, self.weight, eps=torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps)
        return rmsnorm(x, self.weight, eps=self.eps)


class FusedDropoutAddLayerNorm(FusedLayerNorm):
    """LayerNorm(residual + Dropout(x)), dropout while training; parameters and ``state_dict`` of `nn.LayerNorm`.

    Raises:
        ValueError: as `FusedLayerNorm`, or ``p`` outside [0, 1).
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
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p, the dropout probability, must be in [0, 1); got {p}")
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        _check_last_axis(x, self.normalized_shape)
        p = self.p if self.training else 0.0
        return dropout_add_layernorm(x, residual, self.weight, self.bias, eps=self.eps, p=p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


__all__ = [
    "FusedDropoutAddLayerNorm",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "dropout_add_layernorm",
    "layernorm",
    "rmsnorm",
]
