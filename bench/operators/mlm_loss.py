"""The masked-LM loss in the benchmark: cross entropy of hidden @ weightᵀ + bias, mean over the labelled rows.

Least work over M rows of H, a vocabulary of V, e bytes an element:

    pass        FLOPs     bytes
    inference   2 M H V   (M H + V H + V) e            (hidden, weight and bias read)
    backward    4 M H V   2 (M H + V H) e + V e        (hidden and weight read, three gradients written)

The backward is not timed alone: where the two part differs, and some (ours too) have the gradient ready in the forward.

The logits, M V elements, need never exist. "its matrix products" times the three products alone, logits written and
read back: what no implementation that does not recompute can go below.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import masked_lm_loss, reference
from ...model import IGNORE
from ..measure.case import BOUND, OURS, Case, Contestant, Cost, Missing, Run, Tensors, installed, leaf
from ..measure.shapes import Key, Operator, Shape

DIFFERENTIATED = ("hidden", "weight", "bias")


def _inputs(rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    labels[rows - rows // 100 :] = IGNORE  # a run's M is an upper bound: about 1 % of the slots are spare
    return {
        "hidden": draw(rows, hidden_size).to(dtype),
        "weight": (2 * hidden_size**-0.5 * draw(vocab, hidden_size)).to(dtype),  # logits of standard deviation 2
        "bias": (0.1 * draw(vocab)).to(dtype),
        "labels": labels,
    }


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"loss": out, **{f"d{name}": g for name, g in zip(DIFFERENTIATED, gradients, strict=True)}}


def _oracle(inputs: Tensors, dropout_p: float) -> Tensors:
    leaves = [leaf(inputs[name].double()) for name in DIFFERENTIATED]
    hidden, weight, bias = leaves
    loss, _ = reference.masked_lm_loss(hidden, weight, bias, inputs["labels"], ignore_index=IGNORE)
    return _named(loss.detach(), torch.autograd.grad(loss, leaves))


def _yardstick(inputs: Tensors, dropout_p: float) -> Tensors:
    run = _bind(_eager, inputs, dropout_p)
    loss = run.forward()
    return _named(loss.detach(), run.backward(loss))


def _bind(call: Any, inputs: Tensors, dropout_p: float) -> Run:
    """``call(hidden, weight, bias, labels)``."""
    leaves = tuple(leaf(inputs[name]) for name in DIFFERENTIATED)
    return Run(lambda: call(*leaves, inputs["labels"]), leaves, None, _named)


class _ItsMatrixProducts(torch.autograd.Function):
    """logits = hidden @ weightᵀ, and from the logits, as if they were their own gradient, both other products."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, bias, logits)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden, torch.empty_like(bias), None


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORE)


def _eager_fp32(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=IGNORE)


def _torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # with None it would write all logits
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, ignore_index=IGNORE, options=options)


def _lean_skipping(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Any:
    roundoff = torch.finfo(hidden.dtype).eps / 2
    return masked_lm_loss(hidden, weight, bias, labels, lean=True, skip_tolerance=roundoff)


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)(weight, hidden, labels, bias)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, bias=bias, ignore_index=IGNORE)


def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _contestants(compile_peers: bool) -> tuple[list[Contestant], list[Missing]]:
    def contestant(name: str, call: Any, role: str = "peer") -> Contestant:
        return Contestant(name, functools.partial(_bind, call), role=role)

    found = [
        contestant("fusebert", masked_lm_loss, role=OURS),
        contestant("fusebert, lean", functools.partial(masked_lm_loss, lean=True), role=OURS),
        contestant("fusebert, lean, skipping", _lean_skipping, role=OURS),
        contestant("its matrix products", _ItsMatrixProducts.apply, role=BOUND),
        contestant("torch eager", _eager),
        contestant("torch eager, fp32 logits", _eager_fp32),
    ]
    missing = []
    if compile_peers:
        found.append(contestant("torch.compile", torch.compile(_eager_fp32, dynamic=False)))
    else:
        missing.append(Missing("torch.compile", "left out by --quick"))
    if hasattr(F, "linear_cross_entropy") and _takes(F.linear_cross_entropy, "linear_bias"):
        found.append(contestant("torch linear_cross_entropy", _torch_linear_cross_entropy))
    else:
        missing.append(Missing("torch linear_cross_entropy", "needs torch >= 2.13: pip install 'torch>=2.13'"))
    if installed("liger_kernel"):
        found.append(contestant("liger-kernel", _liger))
    else:
        missing.append(Missing("liger-kernel", "not installed: pip install liger-kernel"))
    if not installed("cut_cross_entropy"):
        missing.append(Missing("cut-cross-entropy", "not installed: pip install cut-cross-entropy"))
    else:
        from cut_cross_entropy import linear_cross_entropy

        if _takes(linear_cross_entropy, "bias"):
            found.append(contestant("cut-cross-entropy", _cut_cross_entropy))
        else:
            missing.append(
                Missing("cut-cross-entropy", "the installed release has no decoder bias: install its main branch")
            )
    return found, missing


def _case(rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device, quick: bool) -> Case:
    contestants, missing = _contestants(compile_peers=not quick)
    size, products, parameters = dtype.itemsize, rows * hidden_size * vocab, vocab * hidden_size
    forward = Cost(2 * products, (rows * hidden_size + parameters + vocab) * size)
    backward = Cost(4 * products, (2 * (rows * hidden_size + parameters) + vocab) * size)
    return Case(
        op="mlm_loss",
        name=f"M={rows} H={hidden_size} V={vocab}",
        dtype=dtype,
        device=device,
        shape={"masked": rows, "hidden_size": hidden_size, "vocab_size": vocab},
        inputs=functools.partial(_inputs, rows, hidden_size, vocab, dtype, device),
        oracle=_oracle,
        yardstick=_yardstick,
        passes={
            "inference": forward,
            "forward+backward": Cost(forward.flops + backward.flops, forward.bytes + backward.bytes),
        },
        contestants=tuple(contestants),
        missing=tuple(missing),
    )


def _keys(device: torch.device) -> Mapping[str, Key]:
    """What a shape may say; BERT-base's 15 % of 65536 tokens against 30522 words on a GPU, little on a CPU."""
    rows, hidden_size, vocab = (9830, 768, 30522) if device.type == "cuda" else (256, 128, 2048)
    return {
        "M": Key("rows, of which 1 % have no label", rows),
        "H": Key("elements of a row", hidden_size),
        "V": Key("words", vocab),
    }


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything."""
    rows, hidden_size, vocab = (int(shape[name]) for name in ("M", "H", "V"))
    return dataclasses.replace(_case(rows, hidden_size, vocab, dtype, device, quick), value=value)


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    return ((0, f"M={_keys(device)['M'].default}"),)


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR"]
