"""The four linears of a layer in fp8, for GPUs of Ada, Hopper and later (Micikevicius et al. 2022).

    y = x Wᵀ + b            x, W in e4m3 (4 exponent bits, 3 mantissa bits, maximum 448)
    dx = dy W, dW = dyᵀ x   dy in e5m2 (maximum 57344): gradients need range more than precision

Each tensor is divided by one scale, its largest magnitude over the format's maximum, so that nothing overflows.
Products accumulate in float32 and have the activations' dtype. Weights come from the 16-bit copy of float32 masters.

Tensor cores read both factors along the contracted axis, so the backward also needs x, W and dy transposed, which are
copies. Bytes beside the products, for each 16-bit element of x, dy and W: 2 (largest magnitude) + 2 + 1 (cast) + 2
(transpose). At K = 768 these passes cost much of the gain. Neither the speed nor the loss curve is measured yet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .pretraining import BertForPreTraining

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
NEEDED_CAPABILITY = (8, 9)
MULTIPLE = 16  # `torch._scaled_mm` needs sizes that are multiples of it


def fp8_obstacle(device: torch.device) -> str | None:
    """The reason why ``device`` cannot train in fp8, or None."""
    needed = "it needs an NVIDIA GPU of compute capability 8.9 or more (H100, L40, RTX 40)"
    if device.type != "cuda":
        return f"{needed}, not the {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < NEEDED_CAPABILITY:
        return f"{needed}; {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    return None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q of the fp8 ``dtype``, float32 scale, 0-dim): x ≈ q · scale, and max |q| is the format's maximum."""
    maximum = torch.finfo(dtype).max
    # The clamp keeps 1/scale finite for a tensor of zeros.
    scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny * maximum) / maximum
    return (x.float() / scale).clamp(-maximum, maximum).to(dtype), scale


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a · a_scale) (b · b_scale)ᵀ: a [M, K], b [N, K], both contiguous → [M, N]."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        xq, x_scale = quantize(x, FORWARD)
        wq, w_scale = quantize(weight, FORWARD)
        ctx.save_for_backward(xq, x_scale, wq, w_scale)  # half the bytes of a 16-bit linear
        ctx.dtypes = x.dtype, weight.dtype
        return _product(xq, x_scale, wq, w_scale, x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        xq, x_scale, wq, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        gq, g_scale = quantize(dy, BACKWARD)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _product(gq, g_scale, wq.t().contiguous(), w_scale, x_dtype)
        if ctx.needs_input_grad[1]:
            dweight = _product(gq.t().contiguous(), g_scale, xq.t().contiguous(), x_scale, w_dtype)
        return dx, dweight


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with its three products in fp8. The bias is added in x's dtype.

    Args:
        x: [T, K], bfloat16 or float16; under autocast any dtype. If T is not a multiple of 16, x is copied and padded.
        weight: [N, K], K and N multiples of 16.
        bias: [N] or None.

    Returns:
        [T, N], of x's dtype. Differentiable once.

    Raises:
        ValueError: N or K is not a multiple of 16.
    """
    for name, size in zip(("out_features", "in_features"), weight.shape, strict=True):
        if size % MULTIPLE:
            raise ValueError(f"{name} must be a multiple of {MULTIPLE} for fp8; got {size}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.shape[0]
    if rows % MULTIPLE:
        x = F.pad(x, (0, 0, 0, -rows % MULTIPLE))
    y = _FP8Linear.apply(x, weight)[:rows]  # [T, N]
    return y if bias is None else y + bias


def use_fp8(model: BertForPreTraining) -> None:
    """Make the linears of the model's layers compute in fp8. Heads, embeddings and norms do not change."""
    for layer in model.encoder.layers:
        layer.use_linear(fp8_linear)  # type: ignore[operator]
