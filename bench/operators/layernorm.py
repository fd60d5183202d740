"""LayerNorm(residual + Dropout(x)), the end of each BERT sub-layer.

Least work over T rows of H elements of e bytes (the parameters and the row statistics are negligible):

    pass        FLOPs   bytes
    forward     0       3 T H e     x and the residual read, the result written
    backward    0       3 T H e     the result's gradient and one row tensor (it gives the normalised input) read, one
                                    gradient written, as x and the residual have the same
                        4 T H e     with dropout, where the two gradients differ

The arithmetic is not counted: memory is the limit by far.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...kernels import dropout_add_layernorm, dropout_mask, reference
from ..measure.case import OURS, Cost, Tensors
from .build import Dimension, Operator, Random, Setting, cuda_only, needs

EPS = 1e-12  # BERT's


class LayerNorm(Operator):
    name = "layernorm"
    dimensions = (
        Dimension("T", "rows", gpu=65536, cpu=2048),
        Dimension("H", "elements of a row", gpu=768, cpu=256),
        Dimension("p", "dropout probability", gpu=0.1, cpu=0.1),
    )
    gpu_shapes = (
        (0, "H=768"),
        (3, "H=768,p=0"),
        (6, "H=1024; H=4096"),
        (9, "H=1024,p=0; T=8192; T=32768; T=131072"),
        (12, "T=16384; T=8192,H=4096; T=8192,H=1024; T=131072,H=1024"),
    )
    cpu_shapes = ((0, "H=256"), (3, "H=256,p=0"))
    differentiated = ("x", "residual", "weight", "bias")

    def inputs(self, setting: Setting, random: Random) -> Tensors:
        rows, hidden_size = setting.sizes("T", "H")
        return {
            "x": random.normal(rows, hidden_size),
            "residual": random.normal(rows, hidden_size),
            "weight": 1 + 0.1 * random.normal(hidden_size),
            "bias": 0.1 * random.normal(hidden_size),
            "dout": random.normal(rows, hidden_size),
        }

    def cost(self, setting: Setting) -> tuple[Cost, Cost]:
        rows, hidden_size = setting.sizes("T", "H")
        tensor = rows * hidden_size * setting.dtype.itemsize
        return Cost(0, 3 * tensor), Cost(0, (4 if setting.dropout_p else 3) * tensor)

    @staticmethod
    def reference(dropout_p: float, seed: Tensor, **tensors: Tensor) -> Tensor:
        """With the dropout mask that our kernel draws."""
        x = tensors["x"]
        mask = dropout_mask(dropout_p, seed, *x.shape, device=x.device) if dropout_p else None
        return reference.dropout_add_layernorm(**tensors, eps=EPS, p=dropout_p, dropout_mask=mask)


OPERATOR = LayerNorm()


@OPERATOR.contestant("fusebert", role=OURS, replays_dropout=True)
def fusebert(dropout_p: float, seed: Tensor | None = None, **tensors: Any) -> Tensor:
    return dropout_add_layernorm(**tensors, eps=EPS, p=dropout_p, seed=seed)


@OPERATOR.contestant("torch eager")
def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, dropout_p), x.shape[-1:], weight, bias, EPS)


OPERATOR.compiled_peer(eager)


@OPERATOR.contestant("liger-kernel", needs("liger_kernel", "pip install liger-kernel"), cuda_only)
def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(residual + F.dropout(x, dropout_p), weight, bias, EPS)
