"""A step of contrastive training with cached gradients (Gao et al. 2021, arXiv:2101.06983).

    1. the vectors of all micro-batches, without a graph
    2. the loss over all of them, and its gradient with respect to the vectors
    3. each micro-batch again, with the same dropout masks, and a backward from that gradient

The gradient is that of one large batch; the memory is that of one micro-batch. A step of one micro-batch needs no
second forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...model.contrastive import Candidates, Compared, compare_rows, compare_scores
from ...model.heads import CachedGradientEncoder
from ...model.text_batch import TextBatch
from ..step.step import StepResult, TrainingStep, autocast
from .pairs import ANCHOR, Pairs


class Comparison:
    """The loss of ``pairs``: InfoNCE, or with scores the squared error of the cosine.

    Args:
        temperature: of InfoNCE.
    """

    def __init__(self, pairs: Pairs, temperature: float) -> None:
        self._pairs, self._temperature = pairs, temperature

    def __call__(self, vectors: Tensor, places: np.ndarray) -> Compared:
        """Sums over the rows, and the gradient with respect to ``vectors``.

        Args:
            vectors: [n, H].
            places: int64 [n, 2], row and part of each. Each row is there with all its parts.
        """
        order = np.lexsort((places[:, 0], places[:, 1]))  # anchors by row, positives by row, negatives
        rows, parts = places[order].T
        count = int((parts == ANCHOR).sum())
        index = torch.from_numpy(order).to(vectors.device)
        ones, others = vectors[index].split([count, len(order) - count])
        # A step of one micro-batch comes here under autocast, which would compute the cosines in 16 bits.
        with torch.autocast(vectors.device.type, enabled=False):
            if self._pairs.scores is not None:
                scores = torch.from_numpy(self._pairs.scores[rows[:count]]).to(vectors)
                found = compare_scores(ones, others, scores)
            else:
                numbers = torch.from_numpy(self._pairs.parts[rows, parts]).to(vectors.device)
                candidates = Candidates(numbers[:count], numbers[count : 2 * count], numbers[count:])
                found = compare_rows(ones, others, candidates, self._temperature)
        gradient = torch.empty_like(found.gradient)
        gradient[index] = found.gradient
        return found._replace(gradient=gradient)


class ContrastiveStep:
    """Trains a model by a `Comparison` of all texts of a step. See the module.

    Args:
        step: of the model.
    """

    def __init__(self, step: TrainingStep, comparison: Comparison) -> None:
        self._step, self._comparison = step, comparison

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """That of the step."""
        return self._step.scaler

    def __call__(self, window: Sequence[TextBatch], lr: float, *, seeds: Sequence[int]) -> StepResult:
        """One step on the micro-batches of `PairBatches`.

        Args:
            lr: learning rate.
            seeds: of dropout, one for each micro-batch.
        """
        places = np.concatenate([batch.labels.numpy() for batch in window])
        rows = max(1, int((places[:, 1] == ANCHOR).sum()))
        model: CachedGradientEncoder = self._step.refreshed()
        found: list[Compared] = []

        def gradient(vectors: Tensor) -> Tensor:
            found.append(self._comparison(vectors, places))
            return found[0].gradient / rows

        if len(window) == 1:
            model.gradient = gradient
        else:
            model.gradient = None
            parts = gradient(self._vectors(model, window, seeds)).split([len(batch.labels) for batch in window])
            window = [dataclasses.replace(batch, labels=part) for batch, part in zip(window, parts, strict=True)]
        done = self._step(window, lr, labels=(1,), seeds=seeds)
        sums = torch.stack([found[0].loss_sum.double(), found[0].first.double()])
        return StepResult(sums, done.grad_norm, done.skipped)

    @torch.no_grad()
    def _vectors(self, model: CachedGradientEncoder, window: Sequence[TextBatch], seeds: Sequence[int]) -> Tensor:
        device, vectors = self._step.device, []
        for batch, seed in zip(window, seeds, strict=True):
            torch.manual_seed(seed)
            with autocast(device, self._step.compute_dtype):
                vectors.append(model.vectors(batch.to(device, non_blocking=True)))
        return torch.cat(vectors)  # [n, H]
