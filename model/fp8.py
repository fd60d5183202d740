"""The four big linears of a layer in fp8, for GPUs that multiply it (Micikevicius et al. 2022; Hopper, Ada and later).

    y = x Wᵀ + b            x, W in e4m3 (4 exponent bits, 3 of mantissa, up to 448)
    dx = dy W, dW = dyᵀ x   dy in e5m2 (up to 57344): gradients need range more than precision

Each tensor is divided by one scale, its largest magnitude over the format's, so nothing overflows; products accumulate
in float32 and leave in the activations' dtype. Weights come from float32 masters, through the 16-bit copy.

The tensor cores take A by rows and B by columns, contraction along both: of x, W and dy the backward also needs the
transpose, which is a copy. Bytes beside the products, a 16-bit element: x 2 (largest) + 2 + 1 (cast) + 2 (transposed),
the same for dy and W. At K = 768 these passes eat much of what the products win; whether anything is left on a GPU is
not yet measured, nor is the loss curve: keep to bf16 until both are.
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
MULTIPLE = 16  # of the sizes that `torch._scaled_mm` multiplies


def fp8_obstacle(device: torch.device) -> str | None:
    """Why ``device`` cannot train in fp8; None where it can."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU of compute capability 8.9 or more (H100, L40, RTX 40), not the {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < NEEDED_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (
            f"it needs compute capability 8.9 or more (H100, L40, RTX 40); {name} has {'.'.join(map(str, capability))}"
        )
    return None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q in the fp8 ``dtype``, float32 scale, 0-dim): x ≈ q · scale, with the largest magnitude at the format's."""
    most = torch.finfo(dtype).max
    # An all-zero tensor has any scale; the clamp keeps 1/scale finite.
    scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny * most) / most
    return (x.float() / scale).clamp(-most, most).to(dtype), scale


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a · a_scale) (b · b_scale)ᵀ: a [M, K], b [N, K], both contiguous → [M, N]."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        xq, x_scale = quantize(x, FORWARD)
        wq, w_scale = quantize(weight, FORWARD)
        ctx.save_for_backward(xq, x_scale, wq, w_scale)  # half of what a 16-bit linear keeps
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
    """``F.linear`` with its three products in fp8; the bias is added in x's dtype.

    Args:
        x: [T, K], bfloat16 or float16 (under autocast, any: it is converted). weight: [N, K]. bias: [N] or None.
            K and N are multiples of 16; rows up to the next one are added to x, which costs a copy of it.

    Returns:
        [T, N], of x's dtype. Differentiable once.

    Raises:
        ValueError: a size that is no multiple of 16.
    """
    for name, size in zip(("out_features", "in_features"), weight.shape, strict=True):
        if size % MULTIPLE:
            raise ValueError(f"fp8 products need sizes in multiples of {MULTIPLE}; got {name} = {size}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.shape[0]
    if rows % MULTIPLE:
        x = F.pad(x, (0, 0, 0, -rows % MULTIPLE))
    y = _FP8Linear.apply(x, weight)[:rows]
    return y if bias is None else y + bias


def use_fp8(model: BertForPreTraining) -> None:
    """From now on the model's layers multiply in fp8. The heads, embeddings and norms stay as they are."""
    for layer in model.encoder.layers:
        layer.use_linear(fp8_linear)  # type: ignore[operator]
