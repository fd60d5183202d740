"""Losses that compare the vectors of a batch of texts, with their gradients in bounded memory.

InfoNCE (van den Oord et al. 2018; Henderson et al. 2017, "MultipleNegativesRankingLoss"): of all candidates c of the
batch, the positive p of an anchor a is to be the nearest in cosine,

    L = −log( exp(cos(a, p) / t) / Σ_c exp(cos(a, c) / t) ).

The candidates are the positives of all rows and the hard negatives of all rows. Those that are a's own text, or a text
that some row of the batch calls a positive of a, are no negatives of a and are left out of its sum.

Shapes: B rows, K candidates, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 1 << 22  # of the matrix of similarities, at once


class Compared(NamedTuple):
    """What a batch gave.

    Attributes:
        loss_sum: 0-dim, over the rows.
        first: int64 0-dim, the rows in which the positive is nearer than every negative.
        gradient: of ``loss_sum``, in the vectors' shape.
    """

    loss_sum: Tensor
    first: Tensor
    gradient: Tensor


class Candidates(NamedTuple):
    """Rows and their candidates, as numbers of texts: equal texts have equal numbers.

    Attributes:
        anchors, positives: int64 [B].
        all: int64 [K], the positives first.
    """

    anchors: Tensor
    positives: Tensor
    all: Tensor

    def not_negative(self, rows: slice) -> Tensor:
        """bool [rows, K]: candidates that are no negatives of the row, its own positive included."""
        size = int(max(self.anchors.max(), self.all.max())) + 1
        positive = torch.unique(self.anchors * size + self.positives)
        anchors = self.anchors[rows, None]
        return torch.isin(anchors * size + self.all, positive) | (anchors == self.all)

    def blocks(self) -> Iterator[slice]:
        """Slices of the rows that bound the memory of a [rows, K] matrix."""
        step = max(1, ELEMENTS // max(1, len(self.all)))
        for start in range(0, len(self.anchors), step):
            yield slice(start, min(start + step, len(self.anchors)))


def info_nce(
    anchors: Tensor, candidates: Tensor, positive: Tensor, not_negative: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(Sum of the losses, number of rows in which the positive is nearer than every negative).

    Args:
        anchors: [B, H], of length 1.
        candidates: [K, H], of length 1.
        positive: int64 [B], the number of each row's positive in ``candidates``.
        not_negative: bool [B, K].
        temperature: t.
    """
    similarity = anchors @ candidates.T  # [B, K]
    own = similarity.gather(1, positive[:, None])  # [B, 1]
    negatives = similarity.masked_fill(not_negative, float("-inf"))
    logits = torch.cat([own, negatives], 1) / temperature
    loss_sum = (logits.logsumexp(1) - logits[:, 0]).sum()
    return loss_sum, (own[:, 0] > negatives.amax(1)).sum()


def compare_rows(anchors: Tensor, candidates: Tensor, numbers: Candidates, temperature: float) -> Compared:
    """InfoNCE. The gradient is of both, [B + K, H].

    Args:
        anchors, candidates: [B, H] and [K, H]; the first B candidates are the rows' positives.
        numbers: on the vectors' device.
    """
    count = len(anchors)
    vectors = torch.cat([anchors, candidates]).detach().requires_grad_()
    units = F.normalize(vectors, dim=1)
    leaf = units.detach().requires_grad_()
    loss_sum = vectors.new_zeros(())
    first = torch.zeros((), dtype=torch.int64, device=vectors.device)
    own = torch.arange(count, device=vectors.device)
    with torch.enable_grad():
        for rows in numbers.blocks():
            loss, ranked = info_nce(
                leaf[:count][rows], leaf[count:], own[rows], numbers.not_negative(rows), temperature
            )
            loss.backward()
            loss_sum += loss.detach()
            first += ranked
    units.backward(leaf.grad)
    assert vectors.grad is not None
    return Compared(loss_sum, first, vectors.grad)


def compare_scores(ones: Tensor, others: Tensor, scores: Tensor) -> Compared:
    """The squared error of the cosine: Σ (cos(u, v) − score)². The gradient is of both, [2 B, H]; ``first`` is 0.

    Args:
        ones, others: [B, H].
        scores: [B].
    """
    vectors = torch.cat([ones, others]).detach().requires_grad_()
    with torch.enable_grad():
        cosine = F.cosine_similarity(vectors[: len(ones)], vectors[len(ones) :])
        loss = (cosine - scores).square().sum()
        loss.backward()
    assert vectors.grad is not None
    return Compared(loss.detach(), torch.zeros((), dtype=torch.int64, device=loss.device), vectors.grad)
