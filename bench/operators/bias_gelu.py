"""GELU(x + bias), the step between the feed-forward's two matrix products.

Least work over T rows of I elements of e bytes (the bias is negligible):

    pass        FLOPs   bytes
    forward     0       2 T I e     x read, the result written
    backward    0       3 T I e     the result's gradient and x read, x's gradient written

The arithmetic is not counted: it does not run on the matrix units. The peer to beat is "torch, bias in the product": a
linear adds its bias for free, so only GELU is timed forward, but its backward reads the gradient again to sum it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import bias_gelu, reference
from ..measure.case import OURS, Cost, Run, Tensors
from .build import Dimension, Operator, Random, Setting


class BiasGELU(Operator):
    name = "bias_gelu"
    dimensions = (
        Dimension("T", "rows", gpu=65536, cpu=1024),
        Dimension("I", "elements of a row", gpu=3072, cpu=1024),
    )
    gpu_shapes = ((1, "I=3072"), (8, "I=4096; T=8192"))  # BERT-base's and BERT-large's feed-forward
    cpu_shapes = ((1, "I=1024"),)
    differentiated = ("x", "bias")
    reference = staticmethod(reference.bias_gelu)

    def inputs(self, setting: Setting, random: Random) -> Tensors:
        rows, size = setting.sizes("T", "I")
        return {
            "x": 2 * random.normal(rows, size),
            "bias": 0.1 * random.normal(size),
            "dout": random.normal(rows, size),
        }

    def cost(self, setting: Setting) -> tuple[Cost, Cost]:
        rows, size = setting.sizes("T", "I")
        tensor = rows * size * setting.dtype.itemsize
        return Cost(0, 2 * tensor), Cost(0, 3 * tensor)


OPERATOR = BiasGELU()
OPERATOR.contestant("fusebert", role=OURS)(bias_gelu)


@OPERATOR.contestant("torch eager")
def eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


class _BiasInProduct(torch.autograd.Function):
    """x + bias where the product before has added the bias. The backward sums the gradient's rows, as a linear does."""

    @staticmethod
    def forward(ctx: Any, sum_with_bias: Tensor, bias: Tensor) -> Tensor:
        return sum_with_bias.view_as(sum_with_bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dx,) = gradients
        return dx, dx.sum(0)


def add_bias_untimed(setting: Setting, function: Any, inputs: Tensors, dropout_p: float) -> Run:
    return OPERATOR.bind(setting, function, {**inputs, "x": inputs["x"] + inputs["bias"]}, dropout_p)


@OPERATOR.contestant("torch, bias in the product", bind=add_bias_untimed)
def bias_in_product(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(_BiasInProduct.apply(x, bias))


OPERATOR.missing("liger-kernel", "has no GELU without a gate")
OPERATOR.compiled_peer(eager)
