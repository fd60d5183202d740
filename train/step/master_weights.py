"""16-bit training with float32 master weights: a copy of the model with its matrices in the compute dtype.

Autocast alone casts every matrix in every micro-batch, and every gradient back. Bytes a weight with k micro-batches a
step (16-bit gradients from the matrix products, float32 master weights and gradient sums):

                               autocast                                     low-precision copy
    weight, forward            6 k    (reads 4, writes 2)                   6    (in the first micro-batch)
    gradient                   2 k    written by the product                2 k
    into the fp32 sum          6 k    (reads 2, writes 4)                   6    the first, cast
                               12 (k − 1)  added to it                      10 (k − 1)  cast and added in one pass
    total                      26 k − 12                                    12 k + 2

Both give the same bits. The copy saves 4 launches a layer in the first micro-batch and 8 in each further one
(`tests/train/step/test_launches`). Matrix products that accumulate into the float32 sum would save 4 more bytes, but
need a second path beside PyTorch's autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowPrecisionCopy:
    """A copy of ``model`` with the linears' matrices in ``dtype``; all other parameters are shared with ``model``.

    A backward through the copy accumulates its gradients in ``model``'s parameters, in their dtype.

    Attributes:
        model: the copy.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._master = model
        self._masters: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self._copies: list[Tensor] = [nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in self._masters]
        # deepcopy returns what its memo holds for an object: the low-precision copy of a matrix, any other parameter
        # itself.
        memo: dict[int, object] = {id(p): p for p in model.parameters()}
        memo |= {id(master): copied for master, copied in zip(self._masters, self._copies, strict=True)}
        self.model: nn.Module = copy.deepcopy(model, memo)  # type: ignore[arg-type]
        for master, copied in zip(self._masters, self._copies, strict=True):
            if copied.requires_grad:
                copied.register_post_accumulate_grad_hook(_add_into(master))  # type: ignore[attr-defined]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights and the training mode to the copy. Call it once a step, before the forward."""
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
