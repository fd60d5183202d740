"""Checks a contestant's gradient before its step is timed: every parameter, on a few examples, dropout off.

The oracle is Transformers' gradient in float64. The allowance is Transformers' own error at the compute dtype, and the
rule is that of `measure.correctness`, on the norm over all parameters.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ...model import BertForPreTraining, pack_padded
from ...model.hf import parameter_names
from ...train.step.step import autocast
from ..measure.correctness import RIGHT, WRONG, Verdict, status
from .contestants import our_loss
from .transformers_step import Examples, MaskedRowsOnly, split_examples, transformers_loss


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """In float64; zeros for parameters that the loss does not depend on."""
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad).double() for name, p in model.named_parameters()}


class GradientCheck:
    """Judges models on ``examples``. The models themselves keep their gradients: copies are differentiated."""

    def __init__(self, hf: nn.Module, examples: Examples, layers: int, compute_dtype: torch.dtype) -> None:
        self.examples, self.compute_dtype = examples, compute_dtype
        self.names = parameter_names(layers)  # our name → Transformers' names, concatenated along the first axis
        self.oracle = self._their_gradients(copy.deepcopy(hf).double(), torch.float32)
        self.norm = torch.stack([x.norm() for x in self.oracle.values()]).norm()
        self.allowance = self._error(self._their_gradients(hf, compute_dtype))

    def theirs(self, hf: nn.Module, compute_dtype: torch.dtype, *, gather: bool) -> Verdict:
        """Judge a Transformers model."""
        return self._verdict(self._error(self._their_gradients(hf, compute_dtype, gather=gather)))

    def ours(self, model: BertForPreTraining) -> Verdict:
        """Judge our model."""
        batch = pack_padded(**self.examples)
        model = copy.deepcopy(model).eval()
        with autocast(batch.input_ids.device, self.compute_dtype):
            out = model(batch)
        our_loss(torch.stack([out.mlm_loss_sum, out.nsp_loss_sum]), batch).backward()
        return self._verdict(self._error(_gradients(model)))

    def _their_gradients(self, hf: nn.Module, compute_dtype: torch.dtype, *, gather: bool = False) -> dict[str, Tensor]:
        """Under our names."""
        hf = copy.deepcopy(hf)
        model = (MaskedRowsOnly(hf) if gather else hf).eval()  # type: ignore[arg-type]
        transformers_loss(model, split_examples(self.examples, 1, gather=gather)[0], compute_dtype).backward()
        found = _gradients(hf)
        return {ours: torch.cat([found[part] for part in parts]) for ours, parts in self.names.items()}

    def _error(self, found: dict[str, Tensor]) -> float:
        differences = [(found[name] - right).norm() for name, right in self.oracle.items()]
        return float(torch.stack(differences).norm() / self.norm)

    def _verdict(self, error: float) -> Verdict:
        versus = error / self.allowance
        if not math.isfinite(versus):
            return Verdict(WRONG, {"gradient": error}, detail="the gradient is not finite")
        found = status(versus)
        detail = "" if found == RIGHT else f"the gradient is {versus:.1f} times as far from float64 as Transformers'"
        return Verdict(found, {"gradient": error}, versus, detail)
