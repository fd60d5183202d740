"""LayerNorm(residual + Dropout(x)) in the benchmark, the end of each BERT sub-layer.

Least work over T rows of H elements of e bytes (the parameters and the row statistics are negligible):

    pass        FLOPs   bytes
    forward     0       3 T H e           (x and the residual read, the result written)
    backward    0       3 T H e           (the result's gradient and one row tensor, from which the normalised input
                                          follows, read; one gradient written: x's and the residual's are the same)
                        4 T H e           with dropout, where they differ

The arithmetic is not counted: it is far from being the limit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import dropout_add_layernorm, dropout_mask, reference
from ..measure.case import COMPILE_IS_SLOW, OURS, Case, Contestant, Cost, Missing, Run, Tensors, installed, leaf
from ..measure.shapes import Key, Operator, Shape

EPS = 1e-12  # BERT's
DIFFERENTIATED = ("x", "residual", "weight", "bias")


def _inputs(rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    return {
        "x": draw(rows, hidden_size),
        "residual": draw(rows, hidden_size),
        "weight": 1 + 0.1 * draw(hidden_size),
        "bias": 0.1 * draw(hidden_size),
        "dout": draw(rows, hidden_size),
        "seed": torch.tensor([seed], dtype=torch.int64, device=device),
    }


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **{f"d{name}": g for name, g in zip(DIFFERENTIATED, gradients, strict=True)}}


def _plain(dtype: torch.dtype, inputs: Tensors, dropout_p: float) -> Tensors:
    """The reference at ``dtype``, with the mask our kernel draws."""
    leaves = [leaf(inputs[name].to(dtype)) for name in DIFFERENTIATED]
    x, residual, weight, bias = leaves
    mask = None
    if dropout_p:
        mask = dropout_mask(dropout_p, inputs["seed"], *x.shape, device=x.device)
    out = reference.dropout_add_layernorm(x, residual, weight, bias, eps=EPS, p=dropout_p, dropout_mask=mask)
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs["dout"].to(dtype)))


def _bind(call: Any, inputs: Tensors, dropout_p: float) -> Run:
    """``call(x, residual, weight, bias, dropout_p, seed)``."""
    leaves = tuple(leaf(inputs[name]) for name in DIFFERENTIATED)
    return Run(lambda: call(*leaves, dropout_p, inputs.get("seed")), leaves, inputs["dout"], _named)


def _ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return dropout_add_layernorm(x, residual, weight, bias, eps=EPS, p=p, seed=seed)


def _eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, p), x.shape[-1:], weight, bias, EPS)


def _liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(residual + F.dropout(x, p), weight, bias, EPS)


def _contestants(device: torch.device, compile_peers: bool) -> tuple[list[Contestant], list[Missing]]:
    found = [
        Contestant("fusebert", functools.partial(_bind, _ours), role=OURS, replays_dropout=True),
        Contestant("torch eager", functools.partial(_bind, _eager)),
    ]
    missing = []
    if compile_peers:
        found.append(Contestant("torch.compile", functools.partial(_bind, torch.compile(_eager, dynamic=False))))
    else:
        missing.append(Missing("torch.compile", COMPILE_IS_SLOW))
    if not installed("liger_kernel"):
        missing.append(Missing("liger-kernel", "not installed: pip install liger-kernel"))
    elif device.type != "cuda":
        missing.append(Missing("liger-kernel", "runs on CUDA only"))
    else:
        found.append(Contestant("liger-kernel", functools.partial(_bind, _liger)))
    return found, missing


def _case(
    value: int, rows: int, hidden_size: int, p: float, dtype: torch.dtype, device: torch.device, quick: bool
) -> Case:
    contestants, missing = _contestants(device, compile_peers=not quick)
    tensor_bytes = rows * hidden_size * dtype.itemsize
    forward, backward = 3 * tensor_bytes, (4 if p else 3) * tensor_bytes
    return Case(
        op="layernorm",
        name=f"T={rows} H={hidden_size} dropout={p}",
        dtype=dtype,
        device=device,
        shape={"tokens": rows, "hidden_size": hidden_size},
        inputs=functools.partial(_inputs, rows, hidden_size, dtype, device),
        oracle=functools.partial(_plain, torch.float64),
        yardstick=functools.partial(_plain, dtype),
        passes={
            "forward": Cost(0, forward),
            "backward": Cost(0, backward),
            "forward+backward": Cost(0, forward + backward),
        },
        contestants=tuple(contestants),
        missing=tuple(missing),
        dropout_p=p,
        value=value,
    )


def _keys(device: torch.device) -> Mapping[str, Key]:
    """What a shape may say."""
    rows, hidden_size = (65536, 768) if device.type == "cuda" else (2048, 256)
    return {
        "T": Key("rows", rows),
        "H": Key("elements of a row", hidden_size),
        "p": Key("dropout probability", 0.1),
    }


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything."""
    return _case(value, int(shape["T"]), int(shape["H"]), float(shape["p"]), dtype, device, quick)


_ON_A_GPU = (
    (0, "H=768"),
    (3, "H=768,p=0"),
    (6, "H=1024; H=4096"),
    (9, "H=1024,p=0; T=8192; T=32768; T=131072"),
    (12, "T=16384; T=8192,H=4096; T=8192,H=1024; T=131072,H=1024"),
)
_ON_A_CPU = ((0, "H=256"), (3, "H=256,p=0"))


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    """H = 768, 1024 and 4096, T = 8 k … 128 k, with and without dropout on a GPU; small ones on a CPU."""
    return _ON_A_GPU if device.type == "cuda" else _ON_A_CPU


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR"]
