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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dropout_add_layernorm, dropout_mask, reference
from .cases import OURS, Case, Contestant, Cost, Missing, Run, Tensors, installed, leaf

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
        mask = dropout_mask(dropout_p, inputs["seed"], *x.shape, device=x.device)[0]
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
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(residual + F.dropout(x, p), weight, bias, EPS)


def _contestants(compile_peers: bool) -> tuple[list[Contestant], list[Missing]]:
    found = [
        Contestant("fusebert", functools.partial(_bind, _ours), role=OURS, replays_dropout=True),
        Contestant("torch eager", functools.partial(_bind, _eager)),
    ]
    missing = []
    if compile_peers:
        found.append(Contestant("torch.compile", functools.partial(_bind, torch.compile(_eager, dynamic=False))))
    else:
        missing.append(Missing("torch.compile", "left out by --quick"))
    if installed("liger_kernel"):
        found.append(Contestant("liger-kernel", functools.partial(_bind, _liger)))
    else:
        missing.append(Missing("liger-kernel", "not installed: pip install liger-kernel"))
    return found, missing


def _case(
    value: int, rows: int, hidden_size: int, p: float, dtype: torch.dtype, device: torch.device, quick: bool
) -> Case:
    contestants, missing = _contestants(compile_peers=not quick)
    tensor_bytes = rows * hidden_size * dtype.itemsize
    forward, backward = 3 * tensor_bytes, (4 if p else 3) * tensor_bytes
    return Case(
        op="layernorm",
        name=f"H={hidden_size} dropout={p}",
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


def cases(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> list[Case]:
    """BERT-base's and BERT-large's hidden sizes over 65536 rows on a GPU, small ones on a CPU."""
    if device.type == "cuda":
        wanted = [(0, 65536, 768, 0.1), (3, 65536, 768, 0.0), (6, 65536, 1024, 0.1), (9, 65536, 1024, 0.0)]
    else:
        wanted = [(0, 2048, 256, 0.1), (3, 2048, 256, 0.0)]
    return [
        _case(value, rows, hidden, p, dtype, device, quick) for value, rows, hidden, p in wanted[: 1 if quick else None]
    ]


__all__ = ["cases"]
