"""GELU(x Wᵀ + b) in the benchmark, the feed-forward's first half: where should GELU be computed?

Least work over T rows of H elements, I columns, e bytes an element (the bias is negligible):

    pass        FLOPs     bytes
    forward     2 T H I   (T H + I H + T I) e      (x and W read, the result written)
    backward    4 T H I   (T I + 2 T H + 2 I H) e  (the result's gradient, x and W read, two gradients written)

GELU's arithmetic is not counted: it is not of the matrix units. "fusebert" is what the model does, cuBLAS's product and
then `bias_gelu`; "fusebert, epilogue" the product with GELU in its epilogue (`linear_gelu_epilogue`), which belongs in
kernels/, and in the model, if it is the faster one forward: backward both are the same. "its matrix products" times the
products alone: what is between it and the others is what GELU costs. cuBLASLt has an epilogue of its own, which
approximates GELU by tanh and does not keep what the backward needs: "torch _addmm_activation" multiplies again there.
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
from .linear_gelu_epilogue import TILINGS, linear_gelu

DIFFERENTIATED = ("x", "weight", "bias")
APPROXIMATE = {"erf": "none", "tanh": "tanh"}


def _inputs(rows: int, hidden_size: int, size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return {
        "x": draw(rows, hidden_size),
        "weight": 2 * hidden_size**-0.5 * draw(size, hidden_size),  # sums of standard deviation 2
        "bias": 0.1 * draw(size),
        "dout": draw(rows, size),
    }


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **{f"d{name}": g for name, g in zip(DIFFERENTIATED, gradients, strict=True)}}


def _eager(approximate: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def _plain(dtype: torch.dtype, approximate: str, inputs: Tensors, dropout_p: float) -> Tensors:
    leaves = [leaf(inputs[name].to(dtype)) for name in DIFFERENTIATED]
    out = _eager(approximate, *leaves)
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs["dout"].to(dtype)))


def _bind(call: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Tensors, dropout_p: float) -> Run:
    leaves = tuple(leaf(inputs[name]) for name in DIFFERENTIATED)
    return Run(lambda: call(*leaves), leaves, inputs["dout"], _named)


def _ours(approximate: Literal["none", "tanh"], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if choose_backend(x) == "reference":  # as FusedLinearGELU: a CPU's product adds the bias in passing
        return _eager(approximate, x, weight, bias)
    return bias_gelu(F.linear(x, weight), bias, approximate=approximate)


class _ItsMatrixProducts(torch.autograd.Function):
    """x Wᵀ, and of the result's gradient, as if it were the sum's, both other products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].t() @ x, torch.empty_like(bias)


class _AddmmActivation(torch.autograd.Function):
    """PyTorch's own way to cuBLASLt's epilogue, which has no backward: the sum is made again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        approximate = "tanh" if x.is_cuda else "none"  # what the forward computes there
        z = F.linear(x, weight, bias)
        dz = torch.ops.aten.gelu_backward(gradients[0], z, approximate=approximate)
        return dz @ weight, dz.t() @ x, dz.sum(0)


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
            call = functools.partial(linear_gelu, approximate=approximate, tiling=tiling)
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
    computed = "tanh" if device.type == "cuda" else "none"
    if not hasattr(torch, "_addmm_activation"):
        missing.append(Missing("torch _addmm_activation", f"torch {torch.__version__} has none"))
    elif approximate == computed or dtype in (torch.bfloat16, torch.float16):  # the two GELUs are a rounding apart
        found.append(contestant("torch _addmm_activation", _AddmmActivation.apply))
    else:
        missing.append(Missing("torch _addmm_activation", f"computes gelu={computed} on this device"))
    return found, missing


def _case(
    value: int,
    rows: int,
    hidden_size: int,
    size: int,
    gelu: str,
    dtype: torch.dtype,
    device: torch.device,
    quick: bool,
) -> Case:
    approximate = cast(Literal["none", "tanh"], APPROXIMATE[gelu])
    contestants, missing = _contestants(approximate, dtype, device, quick)
    products, e = 2 * rows * hidden_size * size, dtype.itemsize
    x, weight, out = e * rows * hidden_size, e * size * hidden_size, e * rows * size
    forward = Cost(products, x + weight + out)
    return Case(
        op="linear_gelu",
        name=f"T={rows} H={hidden_size} I={size}" + (" tanh" if gelu == "tanh" else ""),
        dtype=dtype,
        device=device,
        shape={"tokens": rows, "hidden_size": hidden_size, "intermediate_size": size, "gelu": gelu},
        inputs=functools.partial(_inputs, rows, hidden_size, size, dtype, device),
        oracle=functools.partial(_plain, torch.float64, approximate),
        yardstick=functools.partial(_plain, dtype, approximate),
        passes={
            "forward": forward,
            "forward+backward": Cost(3 * products, forward.bytes + out + 2 * x + 2 * weight),
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
        "H": Key("elements of a row", hidden_size),
        "I": Key("elements of a result's row", size),
        "gelu": Key("erf, or its approximation by tanh", "erf", tuple(APPROXIMATE)),
    }


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything."""
    rows, hidden_size, size = (int(shape[name]) for name in ("T", "H", "I"))
    return _case(value, rows, hidden_size, size, str(shape["gelu"]), dtype, device, quick)


_ON_A_GPU = ((1, "H=768"), (8, "H=1024,I=4096; gelu=tanh; T=8192"))
_ON_A_CPU = ((1, "H=256"),)


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    """BERT-base's and BERT-large's feed-forward on a GPU; a small one on a CPU."""
    return _ON_A_GPU if device.type == "cuda" else _ON_A_CPU


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR"]
