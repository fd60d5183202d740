"""A linear with GELU on one side: is GELU faster in the product's epilogue or in a separate pass?

Least work over T rows, H hidden and I intermediate elements, e bytes per element (the bias is negligible):

    linear_gelu    y = GELU(x Wᵀ + b)   x [T, H], y [T, I]
    gelu_linear    y = GELU(x + b) Wᵀ   x [T, I], y [T, H]

    pass        FLOPs     bytes, with x, W and y for their numbers of elements
    forward     2 T H I   (x + W + y) e         x and W read, the result written
    backward    4 T H I   (y + 2 x + 2 W) e     the result's gradient, x and W read, two gradients written

GELU's arithmetic is not counted: it does not run on the matrix units. "fusebert" is what the model runs, cuBLAS's
product and `bias_gelu`. "fusebert, epilogue" is `gelu_epilogue_kernels`: linear_gelu differs in its forward,
gelu_linear in its backward. If it is faster by its interval, it moves to kernels/ and into the model. "its matrix
products" times the products alone; the difference to the others is what GELU costs.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import bias_gelu
from ...kernels.backend import choose_backend
from ..measure.case import BOUND, OURS, Cost, Tensors
from .build import Dimension, Operator, Random, Setting
from .gelu_epilogue_kernels import TILINGS, gelu_linear, linear_gelu

GELU = Literal["none", "tanh"]
APPROXIMATE = {"erf": "none", "tanh": "tanh"}


class _LinearAndGELU(Operator):
    differentiated = ("x", "weight", "bias")
    cpu_shapes = ((1, "H=256"),)

    def widths(self, setting: Setting) -> tuple[int, int]:
        """Elements of a row of x and of the result."""
        raise NotImplementedError

    def options(self, setting: Setting) -> dict[str, Any]:
        return {"approximate": APPROXIMATE[str(setting.shape["gelu"])]}

    def cost(self, setting: Setting) -> tuple[Cost, Cost]:
        (rows,), (width, out_width), e = setting.sizes("T"), self.widths(setting), setting.dtype.itemsize
        flops = 2 * rows * width * out_width
        x, weight, out = e * rows * width, e * width * out_width, e * rows * out_width
        return Cost(flops, x + weight + out), Cost(2 * flops, out + 2 * x + 2 * weight)


def _dimensions(of_hidden: str, of_intermediate: str) -> tuple[Dimension, ...]:
    return (
        Dimension("T", "rows", gpu=65536, cpu=1024),
        Dimension("H", of_hidden, gpu=768, cpu=256),
        Dimension("I", of_intermediate, gpu=3072, cpu=1024),
        Dimension("gelu", "erf, or its approximation by tanh", gpu="erf", cpu="erf", choices=tuple(APPROXIMATE)),
    )


def _linear_gelu_eager(x: Tensor, weight: Tensor, bias: Tensor, approximate: GELU) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def _gelu_linear_eager(x: Tensor, weight: Tensor, bias: Tensor, approximate: GELU) -> Tensor:
    return F.linear(F.gelu(x + bias, approximate=approximate), weight)


class LinearGELU(_LinearAndGELU):
    name = "linear_gelu"
    dimensions = _dimensions("elements of a row", "elements of a result's row")
    gpu_shapes = ((1, "H=768"), (8, "H=1024,I=4096; gelu=tanh; T=8192"))  # BERT-base's and BERT-large's feed-forward
    passes = ("forward", "forward+backward")
    reference = staticmethod(_linear_gelu_eager)

    def widths(self, setting: Setting) -> tuple[int, int]:
        hidden_size, size = setting.sizes("H", "I")
        return hidden_size, size

    def inputs(self, setting: Setting, random: Random) -> Tensors:
        rows, hidden_size, size = setting.sizes("T", "H", "I")
        return {
            "x": random.normal(rows, hidden_size),
            "weight": 2 * hidden_size**-0.5 * random.normal(size, hidden_size),  # sums of standard deviation 2
            "bias": 0.1 * random.normal(size),
            "dout": random.normal(rows, size),
        }


class GELULinear(_LinearAndGELU):
    name = "gelu_linear"
    dimensions = _dimensions("elements of a result's row", "elements of a row")
    gpu_shapes = ((1, "H=768"), (8, "H=1024,I=4096; T=8192"))
    passes = ("backward", "forward+backward")
    reference = staticmethod(_gelu_linear_eager)

    def widths(self, setting: Setting) -> tuple[int, int]:
        hidden_size, size = setting.sizes("H", "I")
        return size, hidden_size

    def inputs(self, setting: Setting, random: Random) -> Tensors:
        rows, hidden_size, size = setting.sizes("T", "H", "I")
        return {
            "x": 2 * random.normal(rows, size),
            "bias": 0.1 * random.normal(size),
            "weight": size**-0.5 * random.normal(hidden_size, size),
            "dout": random.normal(rows, hidden_size),
        }


LINEAR_GELU, GELU_LINEAR = LinearGELU(), GELULinear()


@LINEAR_GELU.contestant("fusebert", role=OURS)
def product_then_bias_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: GELU) -> Tensor:
    if choose_backend(x) == "reference":  # as FusedLinearGELU: on a CPU the product adds the bias
        return _linear_gelu_eager(x, weight, bias, approximate)
    return bias_gelu(F.linear(x, weight), bias, approximate=approximate)


@GELU_LINEAR.contestant("fusebert", role=OURS)
def bias_gelu_then_product(x: Tensor, weight: Tensor, bias: Tensor, approximate: GELU) -> Tensor:
    return F.linear(bias_gelu(x, bias, approximate=approximate), weight)


def triton_only(setting: Setting) -> str | None:
    """A gap where the reference serves the setting's tensors."""
    x = torch.empty(0, dtype=setting.dtype, device=setting.device)
    return None if choose_backend(x) == "triton" else "a Triton kernel: it needs a GPU"


class _MatrixProducts(torch.autograd.Function):
    """x Wᵀ, and both products of a linear's backward; GELU and the bias are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (dy,), (x, weight, bias) = gradients, ctx.saved_tensors
        return dy @ weight, dy.t() @ x, torch.empty_like(bias)


def matrix_products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cast(Tensor, _MatrixProducts.apply(x, weight, bias))


for _operator, _epilogue, _eager in (
    (LINEAR_GELU, linear_gelu, _linear_gelu_eager),
    (GELU_LINEAR, gelu_linear, _gelu_linear_eager),
):
    for _tiling in TILINGS:
        _operator.contestant(f"fusebert, epilogue, {_tiling}", triton_only, role=OURS)(
            functools.partial(_epilogue, tiling=_tiling)
        )
    _operator.contestant("its matrix products", role=BOUND)(matrix_products)
    _operator.contestant("torch eager")(_eager)
    _operator.compiled_peer(_eager)


class _AddmmActivation(torch.autograd.Function):
    """PyTorch's call of cuBLASLt's epilogue. It has no backward and saves no sum, so the backward multiplies again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        z = F.linear(x, weight, bias)
        dz = torch.ops.aten.gelu_backward(gradients[0], z, approximate=_activation(x.device))
        return dz @ weight, dz.t() @ x, dz.sum(0)


def _activation(device: torch.device) -> GELU:
    """The GELU that torch._addmm_activation computes."""
    return "tanh" if device.type == "cuda" else "none"


def other_gelu(setting: Setting) -> str | None:
    """A gap in float32 where the other GELU is wanted; in 16 bits the two differ by a rounding error."""
    if not hasattr(torch, "_addmm_activation"):
        return f"torch {torch.__version__} has none"
    computed = _activation(setting.device)
    same = APPROXIMATE[str(setting.shape["gelu"])] == computed
    return None if same or setting.dtype.itemsize == 2 else f"computes gelu={computed} on this device"


@LINEAR_GELU.contestant("torch _addmm_activation", other_gelu)
def addmm_activation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cast(Tensor, _AddmmActivation.apply(x, weight, bias))
