"""One optimisation step: micro-batches forward and backward, clip, optimiser.

The loss is the mean over *all* labelled positions of the step's micro-batches, on all ranks, not a mean of their means:
the model returns sums, and the counts are known on the host before the step starts, so each sum is divided by the
step's total. Nothing here waits for the device.

The step is two functions of tensors that stay where they are: `TrainingStep.micro_batch`, which reads a batch and adds
to gradients and sums, and `TrainingStep.update`, which changes weights. What the host decides anew at each step
(counts, learning rate, the batch) it writes into such tensors. So the two run as they are, or captured as CUDA graphs
(`graphs.StepGraphs`), and compute the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...model.batch import PackedBatch
from ...model.pretraining import BertForPreTraining
from .graphs import StepGraphs
from .master_weights import Twin
from .optim import set_learning_rate
from .sharding import accumulating, whole


class StepResult(NamedTuple):
    """What a step did, on the model's device (no synchronisation).

    Attributes:
        sums: float64 [4]: MLM loss sum, NSP loss sum, MLM right answers, NSP right answers; this rank's.
        grad_norm: 0-dim, the gradient's 2-norm before clipping; 0 where it overflowed in fp16 and the step was skipped.
    """

    sums: Tensor
    grad_norm: Tensor


class TrainingStep:
    """A model, its optimiser and how they step together.

    In 16 bits a `BertForPreTraining` is run through its `Twin`; a model in a wrapper of its own (DDP, FSDP) is left to
    autocast and the wrapper. In fp16 the loss is scaled (`torch.amp.GradScaler`, Micikevicius et al. 2018), and a step
    whose gradient overflows changes nothing but the scale.

    Args:
        model: what to call, see `sharding.distribute`.
        clip: the gradient is scaled down to this 2-norm.
        compute_dtype: of the matrix products (autocast); float32 switches autocast off.
        graph: run on static buffers; on a GPU captured as CUDA graphs after a few steps. All batches must then have one
            shape, and the optimiser its rate on the device (`make_optimizer`).
        compiled: run the model under ``torch.compile``.
    """

    def __init__(
        self,
        model: BertForPreTraining | DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        compute_dtype: torch.dtype,
        graph: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.compute_dtype = compute_dtype
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if compute_dtype == torch.float16 else None
        self._twin: Twin | None = None
        # FSDP makes a class of its own of the model's.
        if compute_dtype != torch.float32 and type(model) is BertForPreTraining:
            self._twin = Twin(model, compute_dtype)
        called: Any = self._twin.model if self._twin is not None else model
        self._call = torch.compile(called, dynamic=False) if compiled else called
        self._counts = torch.ones(2, device=self.device)  # labelled positions and pairs of the step
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._grad_norm = torch.zeros((), device=self.device)
        self._graphs = StepGraphs(self) if graph else None

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
        # Filled by a kernel each: a copy from the host would have to wait for its source to be pinned.
        for count, number in zip(self._counts.unbind(), labels, strict=True):
            count.fill_(max(1, number))
        self._sums.zero_()
        set_learning_rate(self.optimizer, lr)
        if self._graphs is not None:
            self._graphs(window, seeds)
        else:
            for i, batch in enumerate(window):
                if seeds is not None:
                    torch.manual_seed(seeds[i])
                with accumulating(self.model, last=i == len(window) - 1):
                    self.micro_batch(batch.to(self.device, non_blocking=True), first=i == 0)
            self.update()
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(self._sums.clone(), self._grad_norm.clone())

    def micro_batch(self, batch: PackedBatch, *, first: bool) -> None:
        """Forward and backward: adds to the gradients and to the step's sums."""
        if first and self._twin is not None:
            self._twin.refresh()
        with autocast(self.device, self.compute_dtype):
            out = self._call(batch)
        num_masked, num_pairs = self._counts.unbind()
        loss = out.mlm_loss_sum / num_masked + out.nsp_loss_sum / num_pairs
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._sums += torch.stack([x.detach().double() for x in out])

    def update(self) -> None:
        """Clips, and steps the optimiser."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        if self.scaler is None:
            self.optimizer.step()
        else:
            norm = torch.nan_to_num(norm, nan=0.0, posinf=0.0)
            self.scaler.step(self.optimizer)  # the optimiser's own kernels skip it: found_inf stays on the device
            self.scaler.update()
        self._grad_norm.copy_(norm)


def autocast(device: torch.device, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Matrix products in ``compute_dtype`` within the block; nothing for float32."""
    if compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype)


__all__ = ["StepResult", "TrainingStep", "autocast"]
