"""The masked-LM loss: cross entropy of hidden @ weightᵀ + bias, mean over the labelled rows.

Least work over M rows of H, a vocabulary of V, e bytes per element:

    pass        FLOPs     bytes
    inference   2 M H V   (M H + V H + V) e            hidden, weight and bias read
    backward    4 M H V   2 (M H + V H) e + V e        hidden and weight read, three gradients written

The backward is not timed alone: some contestants, ours included, compute the gradient in the forward.

The logits, M V elements, need not be stored. "its matrix products" times the three products alone with logits written
and read back, a lower bound for every implementation that does not recompute.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import masked_lm_loss, reference
from ...model import IGNORE
from ..measure.case import BOUND, OURS, Cost, Tensors, installed
from .build import Dimension, Operator, Random, Setting, needs


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORE)


class MaskedLMLoss(Operator):
    name = "mlm_loss"
    dimensions = (
        Dimension("M", "rows, of which 1 % have no label", gpu=9830, cpu=256),  # 15 % of 65536 tokens
        Dimension("H", "elements of a row", gpu=768, cpu=128),
        Dimension("V", "words", gpu=30522, cpu=2048),
    )
    gpu_shapes = ((0, "M=9830"),)
    cpu_shapes = ((0, "M=256"),)
    differentiated = ("hidden", "weight", "bias")
    passes = ("inference", "forward+backward")
    result = "loss"
    yardstick = staticmethod(eager)

    def inputs(self, setting: Setting, random: Random) -> Tensors:
        rows, hidden_size, vocab = setting.sizes("M", "H", "V")
        labels = torch.randint(0, vocab, (rows,), generator=random.generator, device=setting.device)
        labels[rows - rows // 100 :] = IGNORE  # a run's M is an upper bound: about 1 % of the slots are spare

        def normal(scale: float, *size: int) -> Tensor:
            return (scale * random.normal(*size, dtype=torch.float32)).to(setting.dtype)

        return {
            "hidden": normal(1.0, rows, hidden_size),
            "weight": normal(2 * hidden_size**-0.5, vocab, hidden_size),  # logits of standard deviation 2
            "bias": normal(0.1, vocab),
            "labels": labels,
        }

    def cost(self, setting: Setting) -> tuple[Cost, Cost]:
        (rows, hidden_size, vocab), e = setting.sizes("M", "H", "V"), setting.dtype.itemsize
        products, matrices = rows * hidden_size * vocab, (rows + vocab) * hidden_size
        return Cost(2 * products, (matrices + vocab) * e), Cost(4 * products, (2 * matrices + vocab) * e)

    @staticmethod
    def reference(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return reference.masked_lm_loss(hidden, weight, bias, labels, ignore_index=IGNORE)[0]


OPERATOR = MaskedLMLoss()


@OPERATOR.contestant("fusebert", role=OURS)
def chunked(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, masked_lm_loss(hidden, weight, bias, labels))


@OPERATOR.contestant("fusebert, lean", role=OURS)
def lean(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, masked_lm_loss(hidden, weight, bias, labels, lean=True))


@OPERATOR.contestant("fusebert, lean, skipping", role=OURS)
def lean_skipping(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    roundoff = torch.finfo(hidden.dtype).eps / 2
    return cast(Tensor, masked_lm_loss(hidden, weight, bias, labels, lean=True, skip_tolerance=roundoff))


class _MatrixProducts(torch.autograd.Function):
    """logits = hidden @ weightᵀ, and both other products from the logits, as if they were their own gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, bias, logits)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        hidden, weight, bias, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden, torch.empty_like(bias)


@OPERATOR.contestant("its matrix products", role=BOUND)
def matrix_products(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cast(Tensor, _MatrixProducts.apply(hidden, weight, bias))


OPERATOR.contestant("torch eager")(eager)


@OPERATOR.contestant("torch eager, fp32 logits")
def eager_fp32(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=IGNORE)


OPERATOR.compiled_peer(eager_fp32)


def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def torch_with_bias(setting: Setting) -> str | None:
    """A gap where F.linear_cross_entropy does not exist or takes no bias."""
    if hasattr(F, "linear_cross_entropy") and _takes(F.linear_cross_entropy, "linear_bias"):
        return None
    return "needs torch >= 2.13: pip install 'torch>=2.13'"


@OPERATOR.contestant("torch linear_cross_entropy", torch_with_bias)
def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # None would store all logits
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, ignore_index=IGNORE, options=options)


@OPERATOR.contestant("liger-kernel", needs("liger_kernel", "pip install liger-kernel"))
def liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)(weight, hidden, labels, bias)


def cut_cross_entropy_with_bias(setting: Setting) -> str | None:
    """A gap where cut-cross-entropy is not installed or takes no bias."""
    if not installed("cut_cross_entropy"):
        return "not installed: pip install cut-cross-entropy"
    from cut_cross_entropy import linear_cross_entropy

    if not _takes(linear_cross_entropy, "bias"):
        return "the installed release has no decoder bias: install its main branch"
    return None


@OPERATOR.contestant("cut-cross-entropy", cut_cross_entropy_with_bias)
def cut_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, bias=bias, ignore_index=IGNORE)
