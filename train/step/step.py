"""One optimisation step: forward and backward of the micro-batches, gradient clipping, optimiser.

The loss is the mean over *all* labelled positions of the step, over its micro-batches and ranks, not a mean of means:
the model returns sums, and each sum is divided by the step's label count, which the host knows before the step. The
host never waits for the device.

The step consists of two functions of tensors at fixed addresses: `TrainingStep.micro_batch` adds to gradients and sums,
`TrainingStep.update` changes the weights. What changes from step to step (label counts, learning rate, the batch) is
written into such tensors. The functions can therefore be captured as CUDA graphs (`graphs.StepGraphs`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...model.batch import Batch
from ...model.heads import CachedGradientEncoder, SequenceClassifier, SpanPredictor, TokenClassifier
from ...model.pretraining import BertForPreTraining
from .graphs import StepGraphs
from .master_weights import LowPrecisionCopy
from .optim import set_learning_rate
from .sharding import accumulating, agree_on_largest, full_tensor
from .static_batch import StaticBatch

# Models that compute all but their matrices in float32.
COPIED = (BertForPreTraining, CachedGradientEncoder, SequenceClassifier, TokenClassifier, SpanPredictor)


class StepResult(NamedTuple):
    """Results of a step, on the model's device and not synchronised.

    Attributes:
        sums: float64 [2k], of this rank, for a model with k losses: the sum of each loss, then the number of correct
            predictions of each (pretraining: MLM, NSP).
        grad_norm: float32 scalar, the gradient's 2-norm before clipping; 0 if the step was skipped.
        skipped: float32 scalar, 1 if loss or gradient was not finite, so that the step changed no weight, else 0. The
            same on all ranks.
    """

    sums: Tensor
    grad_norm: Tensor
    skipped: Tensor


class TrainingStep:
    """A model and its optimiser, stepped together.

    In 16 bits one of `COPIED` runs as a `LowPrecisionCopy`; a wrapped model (DDP, FSDP) runs under autocast. In
    fp16 the loss is scaled (`torch.amp.GradScaler`, Micikevicius et al. 2018). A step with a loss or gradient that is
    not finite changes no weight and no moment; in fp16, where a scaled gradient can overflow, it lowers the scale.

    Args:
        model: the module to call, see `sharding.distribute`. It maps a batch to a named tuple of k sums of losses and k
            numbers of correct predictions, and the batch has k ``label_counts``.
        optimizer: one of `make_optimizer`; others, without PyTorch's ``found_inf``, do not skip steps but in fp16.
        clip: largest 2-norm of the gradient.
        compute_dtype: dtype of the matrix products (autocast); float32 turns autocast off.
        graph: run on static buffers, on a GPU captured as CUDA graphs after a few steps. All batches must have one
            shape, and the optimiser's learning rate must be on the device (`make_optimizer`).
        compiled: run the model under ``torch.compile``.
        losses: k, the number of losses of the model.

    Attributes:
        sums: as `StepResult.sums`, of the current step.
        scaler: the loss scale; None but in fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        compute_dtype: torch.dtype,
        graph: bool = False,
        compiled: bool = False,
        losses: int = 2,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.compute_dtype = compute_dtype
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if compute_dtype == torch.float16 else None
        self.sums = torch.zeros(2 * losses, dtype=torch.float64, device=self.device)
        self._copy: LowPrecisionCopy | None = None
        # Not isinstance: FSDP replaces the model's class by a subclass.
        if compute_dtype != torch.float32 and type(model) in COPIED:
            self._copy = LowPrecisionCopy(model, compute_dtype)
        called: Any = self._copy.model if self._copy is not None else model
        self._call = torch.compile(called, dynamic=False) if compiled else called
        self._counts = torch.ones(losses, device=self.device)  # labels of the step, of each loss
        self._grad_norm = torch.zeros((), device=self.device)
        self._skipped = torch.zeros((), device=self.device)
        # The optimiser's kernels read it on the device: no host sync. GradScaler sets its own.
        if self.scaler is None and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = self._skipped  # type: ignore[attr-defined]
        self._graph = graph
        self._graphs: StepGraphs | None = None

    def __call__(
        self,
        window: Sequence[Batch],
        lr: float,
        *,
        labels: tuple[int, ...] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> StepResult:
        """One step.

        Args:
            window: the micro-batches of this rank, on any device.
            lr: learning rate.
            labels: number of labels of each loss in the step over all ranks; None: those of ``window``.
            seeds: for torch's generators, one for each micro-batch; None leaves the generators alone.
        """
        if labels is None:
            labels = tuple(map(sum, zip(*(batch.label_counts for batch in window), strict=True)))
        # fill_ takes the number as a kernel argument. A copy from the host would need pinned memory to be asynchronous.
        for count, number in zip(self._counts.unbind(), labels, strict=True):
            count.fill_(max(1, number))
        self.sums.zero_()
        set_learning_rate(self.optimizer, lr)
        if self._graph:
            if self._graphs is None:
                static = StaticBatch(window[0], self.device)
                self._graphs = StepGraphs(self.micro_batch, self.update, self.optimizer, static)
            self._graphs(window, seeds)
        else:
            for i, batch in enumerate(window):
                if seeds is not None:
                    torch.manual_seed(seeds[i])
                with accumulating(self.model, last=i == len(window) - 1):
                    self.micro_batch(batch.to(self.device, non_blocking=True), first=i == 0)
            self.update()
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(self.sums.clone(), self._grad_norm.clone(), self._skipped.clone())

    def refreshed(self) -> Any:
        """The module that the next step calls, with the current weights: for a forward before it."""
        if self._copy is not None:
            self._copy.refresh()
            return self._copy.model
        return self.model

    def forget_shapes(self) -> None:
        """The next batches have other shapes. Call it when the device has done all steps."""
        if self._graphs is not None:
            self._graphs = None
            self.optimizer.zero_grad(set_to_none=True)  # the gradients are in the graphs' memory

    def micro_batch(self, batch: Any, *, first: bool) -> None:
        """Forward and backward of ``batch``: adds to the gradients and to ``sums``."""
        if first and self._copy is not None:
            self._copy.refresh()
        with autocast(self.device, self.compute_dtype):
            out = self._call(batch)
        means = [loss_sum / count for loss_sum, count in zip(out, self._counts.unbind(), strict=False)]
        loss = functools.reduce(torch.add, means)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.sums += torch.stack([x.detach().double() for x in out])

    def update(self) -> None:
        """Clips the gradients and steps the optimiser."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        finite = torch.isfinite(functools.reduce(torch.add, self.sums[: len(self._counts)].unbind(), norm))
        self._skipped.copy_(agree_on_largest(1.0 - finite.float(), self.model))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._grad_norm.copy_(torch.where(self._skipped > 0.0, 0.0, norm))


def autocast(device: torch.device, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to ``compute_dtype``; a null context for float32."""
    if compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype)
