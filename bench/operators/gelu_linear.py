"""GELU(x + b) Wᵀ in the benchmark, the feed-forward's second half: where should GELU's derivative be multiplied in?

Least work over T rows of I elements, H columns, e bytes an element (the bias is negligible):

    pass        FLOPs     bytes
    forward     2 T H I   (T I + I H + T H) e      (x and W read, the result written)
    backward    4 T H I   (T H + 2 T I + 2 I H) e  (the result's gradient, x and W read, two gradients written)

The twin of `linear_gelu`, backward: "fusebert" is what the model does, "fusebert, epilogue" has the derivative in the
epilogue of the product that gives x's gradient (`gelu_linear_epilogue`), which belongs in kernels/, and in the model,
if its backward is the faster one: forward both are the same. "its matrix products" times the products alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import bias_gelu
from ...kernels.backend import choose_backend
from ..measure.case import BOUND, COMPILE_IS_SLOW, OURS, Case, Contestant, Cost, Missing, Run, Tensors, leaf
from ..measure.shapes import Key, Operator, Shape
from .gelu_linear_epilogue import gelu_linear
from .linear_gelu import APPROXIMATE
from .linear_gelu_epilogue import TILINGS

DIFFERENTIATED = ("x", "bias", "weight")


def _inputs(rows: int, hidden_size: int, size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return {
        "x": 2 * draw(rows, size),
        "bias": 0.1 * draw(size),
        "weight": size**-0.5 * draw(hidden_size, size),
        "dout": draw(rows, hidden_size),
    }


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **{f"d{name}": g for name, g in zip(DIFFERENTIATED, gradients, strict=True)}}


def _eager(approximate: str, x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.gelu(x + bias, approximate=approximate), weight)


def _plain(dtype: torch.dtype, approximate: str, inputs: Tensors, dropout_p: float) -> Tensors:
    leaves = [leaf(inputs[name].to(dtype)) for name in DIFFERENTIATED]
    out = _eager(approximate, *leaves)
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs["dout"].to(dtype)))


def _bind(call: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Tensors, dropout_p: float) -> Run:
    leaves = tuple(leaf(inputs[name]) for name in DIFFERENTIATED)
    return Run(lambda: call(*leaves), leaves, inputs["dout"], _named)


def _ours(approximate: Literal["none", "tanh"], x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return F.linear(bias_gelu(x, bias, approximate=approximate), weight)


class _ItsMatrixProducts(torch.autograd.Function):
    """x Wᵀ, and both products of a linear's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, bias, weight = ctx.saved_tensors
        return gradients[0] @ weight, torch.empty_like(bias), gradients[0].t() @ x


def _contestants(
    approximate: Literal["none", "tanh"], dtype: torch.dtype, device: torch.device, quick: bool
) -> tuple[list[Contestant], list[Missing]]:
    def contestant(name: str, call: Callable[..., Tensor], role: str = "peer") -> Contestant:
        return Contestant(name, functools.partial(_bind, call), role=role)

    eager = functools.partial(_eager, approximate)
    found = [contestant("fusebert", functools.partial(_ours, approximate), OURS)]
    missing = []
    for tiling in TILINGS:
        name = f"fusebert, epilogue, {tiling}"
        if choose_backend(torch.empty(0, dtype=dtype, device=device)) == "triton":
            call = functools.partial(gelu_linear, approximate=approximate, tiling=tiling)
            found.append(contestant(name, call, OURS))
        else:
            missing.append(Missing(name, "a Triton kernel: it needs a GPU"))
    found += [
        contestant("its matrix products", _ItsMatrixProducts.apply, BOUND),
        contestant("torch eager", eager),
    ]
    if quick:
        missing.append(Missing("torch.compile", COMPILE_IS_SLOW))
    else:
        found.append(contestant("torch.compile", torch.compile(eager, dynamic=False)))
    return found, missing


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything."""
    rows, hidden_size, size = (int(shape[name]) for name in ("T", "H", "I"))
    gelu = str(shape["gelu"])
    approximate = cast(Literal["none", "tanh"], APPROXIMATE[gelu])
    contestants, missing = _contestants(approximate, dtype, device, quick)
    products, e = 2 * rows * hidden_size * size, dtype.itemsize
    x, weight, out = e * rows * size, e * size * hidden_size, e * rows * hidden_size
    forward, backward = Cost(products, x + weight + out), Cost(2 * products, out + 2 * x + 2 * weight)
    return Case(
        op="gelu_linear",
        name=f"T={rows} H={hidden_size} I={size}" + (" tanh" if gelu == "tanh" else ""),
        dtype=dtype,
        device=device,
        shape={"tokens": rows, "hidden_size": hidden_size, "intermediate_size": size, "gelu": gelu},
        inputs=functools.partial(_inputs, rows, hidden_size, size, dtype, device),
        oracle=functools.partial(_plain, torch.float64, approximate),
        yardstick=functools.partial(_plain, dtype, approximate),
        passes={
            "backward": backward,
            "forward+backward": Cost(forward.flops + backward.flops, forward.bytes + backward.bytes),
        },
        contestants=tuple(contestants),
        missing=tuple(missing),
        value=value,
    )


def _keys(device: torch.device) -> Mapping[str, Key]:
    """What a shape may say."""
    rows, hidden_size, size = (65536, 768, 3072) if device.type == "cuda" else (1024, 256, 1024)
    return {
        "T": Key("rows", rows),
        "H": Key("elements of a result's row", hidden_size),
        "I": Key("elements of a row", size),
        "gelu": Key("erf, or its approximation by tanh", "erf", tuple(APPROXIMATE)),
    }


_ON_A_GPU = ((1, "H=768"), (8, "H=1024,I=4096; T=8192"))
_ON_A_CPU = ((1, "H=256"),)


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    """BERT-base's and BERT-large's feed-forward on a GPU; a small one on a CPU."""
    return _ON_A_GPU if device.type == "cuda" else _ON_A_CPU


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR"]
