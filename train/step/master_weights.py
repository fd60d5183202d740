"""A model's twin for 16-bit training: its matrices live in the compute dtype, their masters stay in float32.

Autocast alone casts every matrix anew in every micro-batch, and every gradient back. Bytes a weight, k micro-batches a
step (16-bit gradients from the matrix products, fp32 masters and sums):

                               autocast                                     twin
    weight, forward            6 k    (reads 4, writes 2)                   6    (in the first)
    gradient                   2 k    written by the product                2 k
    into the fp32 sum          6 k    (reads 2, writes 4)                   6    the first, cast
                               12 (k − 1)  added to it                      10 (k − 1)  cast and added in one pass
    in all                     26 k − 12                                    12 k + 2

Both compute the same, to the bit. Of a layer's launches the twin saves 4 in the first micro-batch and 8 in each further
one (`tests/train/step/test_launches`). The products could also add to the fp32 sum themselves, 4 bytes less again: not
worth a second path beside PyTorch's autograd.

The rest (embeddings, LayerNorms, biases) is not copied: the twin holds the very same parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...model.pretraining import BertForPreTraining


class Twin:
    """Copies of the linears' matrices in ``dtype``, in a model that shares everything else with ``model``.

    A backward through the twin leaves its gradients in ``model``'s parameters, summed over backwards in their dtype.

    Attributes:
        model: what to call in place of the master.
    """

    def __init__(self, model: BertForPreTraining, dtype: torch.dtype) -> None:
        self._master = model
        self._masters: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self._copies: list[Tensor] = [nn.Parameter(p.detach().to(dtype)) for p in self._masters]
        # deepcopy takes what it finds in its memo for the copy: masters become their copies, the rest remains itself.
        memo: dict[int, object] = {id(p): p for p in model.parameters()}
        memo |= {id(master): copied for master, copied in zip(self._masters, self._copies, strict=True)}
        self.model: BertForPreTraining = copy.deepcopy(model, memo)  # type: ignore[arg-type]
        for master, copied in zip(self._masters, self._copies, strict=True):
            copied.register_post_accumulate_grad_hook(_add_into(master))  # type: ignore[attr-defined]

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the masters' values and the model's mode, once a step: whatever changed them."""
        torch._foreach_copy_(self._copies, self._masters)
        if self.model.training != self._master.training:
            self.model.train(self._master.training)


def _add_into(master: Tensor) -> Callable[[Tensor], None]:
    def add(copied: Tensor) -> None:
        grad, copied.grad = copied.grad, None
        assert grad is not None
        if master.grad is None:
            master.grad = grad.to(master.dtype)
        else:
            master.grad.add_(grad)

    return add


__all__ = ["Twin"]
