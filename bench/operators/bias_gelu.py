"""GELU(x + bias) in the benchmark, the step between the feed-forward's two matrix products.

Least work over T rows of I elements of e bytes (the bias is negligible):

    pass        FLOPs   bytes
    forward     0       2 T I e           (x read, the result written)
    backward    0       3 T I e           (the result's gradient and x read, x's gradient written)

The arithmetic is not counted: it is not of the matrix units. "torch, bias in the product" is the rival that matters: a
linear adds its bias for nothing, so only GELU is timed forward; but its backward reads the gradient again to sum it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import bias_gelu, reference
from ..measure.case import COMPILE_IS_SLOW, OURS, Case, Contestant, Cost, Missing, Run, Tensors, leaf
from ..measure.shapes import Key, Operator, Shape


def _inputs(rows: int, size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return {"x": 2 * draw(rows, size), "bias": 0.1 * draw(size), "dout": draw(rows, size)}


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **dict(zip(("dx", "dbias"), gradients, strict=True))}


def _plain(dtype: torch.dtype, inputs: Tensors, dropout_p: float) -> Tensors:
    leaves = [leaf(inputs[name].to(dtype)) for name in ("x", "bias")]
    out = reference.bias_gelu(*leaves)
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs["dout"].to(dtype)))


def _bind(call: Callable[[Tensor, Tensor], Tensor], inputs: Tensors, dropout_p: float) -> Run:
    leaves = leaf(inputs["x"]), leaf(inputs["bias"])
    return Run(lambda: call(*leaves), leaves, inputs["dout"], _named)


class _AddedInTheProduct(torch.autograd.Function):
    """x + bias, which is there already, and backward what a linear does for its bias: sum the gradient's rows."""

    @staticmethod
    def forward(ctx: Any, x_and_bias: Tensor, bias: Tensor) -> Tensor:
        return x_and_bias.view_as(x_and_bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dx,) = gradients
        return dx, dx.sum(0)


def _bind_added_before(inputs: Tensors, dropout_p: float) -> Run:
    leaves = leaf(inputs["x"] + inputs["bias"]), leaf(inputs["bias"])
    return Run(lambda: F.gelu(_AddedInTheProduct.apply(*leaves)), leaves, inputs["dout"], _named)


def _eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _case(value: int, rows: int, size: int, dtype: torch.dtype, device: torch.device, quick: bool) -> Case:
    found = [
        Contestant("fusebert", functools.partial(_bind, bias_gelu), role=OURS),
        Contestant("torch eager", functools.partial(_bind, _eager)),
        Contestant("torch, bias in the product", _bind_added_before),
    ]
    missing = [Missing("liger-kernel", "has no GELU without a gate")]
    if quick:
        missing.append(Missing("torch.compile", COMPILE_IS_SLOW))
    else:
        found.append(Contestant("torch.compile", functools.partial(_bind, torch.compile(_eager, dynamic=False))))
    tensor_bytes = rows * size * dtype.itemsize
    return Case(
        op="bias_gelu",
        name=f"T={rows} I={size}",
        dtype=dtype,
        device=device,
        shape={"tokens": rows, "intermediate_size": size},
        inputs=functools.partial(_inputs, rows, size, dtype, device),
        oracle=functools.partial(_plain, torch.float64),
        yardstick=functools.partial(_plain, dtype),
        passes={
            "forward": Cost(0, 2 * tensor_bytes),
            "backward": Cost(0, 3 * tensor_bytes),
            "forward+backward": Cost(0, 5 * tensor_bytes),
        },
        contestants=tuple(found),
        missing=tuple(missing),
        value=value,
    )


def _keys(device: torch.device) -> Mapping[str, Key]:
    """What a shape may say."""
    rows, size = (65536, 3072) if device.type == "cuda" else (1024, 1024)
    return {"T": Key("rows", rows), "I": Key("elements of a row", size)}


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything."""
    return _case(value, int(shape["T"]), int(shape["I"]), dtype, device, quick)


_ON_A_GPU = ((1, "I=3072"), (8, "I=4096; T=8192"))
_ON_A_CPU = ((1, "I=1024"),)


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    """BERT-base's and BERT-large's feed-forward on a GPU; a small one on a CPU."""
    return _ON_A_GPU if device.type == "cuda" else _ON_A_CPU


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR"]
