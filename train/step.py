"""One optimisation step: micro-batches forward and backward, clip, AdamW.

The loss is the mean over *all* labelled positions of the step's micro-batches, on all ranks, not a mean of their means:
the model returns sums, and the counts are known on the host before the step starts, so each sum is divided by the
step's total. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..model.packing import PackedBatch
from ..model.pretraining import BertForPreTraining
from .sharding import accumulating, whole


class StepResult(NamedTuple):
    """What a step did, on the model's device (no synchronisation).

    Attributes:
        sums: float64 [4]: MLM loss sum, NSP loss sum, MLM right answers, NSP right answers; this rank's.
        grad_norm: 0-dim, the gradient's 2-norm before clipping.
    """

    sums: Tensor
    grad_norm: Tensor


class TrainingStep:
    """A model, its optimiser and how they step together.

    Args:
        model: what to call, see `sharding.distribute`.
        clip: the gradient is scaled down to this 2-norm.
        compute_dtype: of the matrix products (autocast); float32 switches autocast off.
    """

    def __init__(
        self,
        model: BertForPreTraining | DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        compute_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.compute_dtype = compute_dtype
        self.device = next(model.parameters()).device

    def __call__(
        self,
        window: Sequence[PackedBatch],
        lr: float,
        *,
        labels: tuple[int, int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> StepResult:
        """Steps once on the micro-batches in ``window`` (on any device) with the learning rate ``lr``.

        Args:
            labels: masked tokens and pairs of the step, over all ranks; None: those of ``window``.
            seeds: what torch's generators are seeded with before each micro-batch; None leaves them alone.
        """
        if labels is None:
            labels = sum(batch.num_masked for batch in window), sum(batch.num_pairs for batch in window)
        num_masked, num_pairs = (max(1, count) for count in labels)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for i, batch in enumerate(window):
            if seeds is not None:
                torch.manual_seed(seeds[i])
            with accumulating(self.model, last=i == len(window) - 1):
                with autocast(self.device, self.compute_dtype):
                    out = self.model(batch.to(self.device, non_blocking=True))
                (out.mlm_loss_sum / num_masked + out.nsp_loss_sum / num_pairs).backward()
            sums += torch.stack([x.detach().double() for x in out])
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(sums, grad_norm)


def autocast(device: torch.device, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Matrix products in ``compute_dtype`` within the block; nothing for float32."""
    if compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype)


__all__ = ["StepResult", "TrainingStep", "autocast"]
