"""Evaluation on held-out text: masked-LM loss and accuracy, next-sentence loss and accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...model.batch import PackedBatch
from ...model.pretraining import BertForPreTraining
from ..step.distributed import Ranks
from ..step.step import autocast
from .signals import Stopped, StopSignal


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over the labelled positions and pairs of a set of batches.

    Attributes:
        mlm_loss: nats a masked token.
        mlm_accuracy: share of the masked tokens that the arg max predicts.
        nsp_loss, nsp_accuracy: the same for sentence pairs; None without pairs.
        num_masked, num_pairs: number of masked tokens and of pairs.
    """

    mlm_loss: float
    mlm_accuracy: float
    nsp_loss: float | None
    nsp_accuracy: float | None
    num_masked: int
    num_pairs: int

    @property
    def perplexity(self) -> float:
        """e^mlm_loss (as in Devlin et al. 2018); infinite on overflow."""
        return math.exp(self.mlm_loss) if self.mlm_loss < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """The fields and the perplexity, for log.jsonl, report.json and checkpoints."""
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`; other keys are ignored."""
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})


@torch.no_grad()
def evaluate(
    model: BertForPreTraining,
    batches: Sequence[PackedBatch],
    compute_dtype: torch.dtype,
    ranks: Ranks | None = None,
    stop: StopSignal | None = None,
) -> Evaluation:
    """Evaluates the model on ``batches``, without dropout. The model's mode and the generators do not change.

    Args:
        batches: the same in every process of ``ranks``. The processes share the work.
        compute_dtype: dtype of the matrix products.
        ranks: None: this process alone.
        stop: looked at after each batch, in all ranks.

    Raises:
        Stopped: ``stop`` has received a signal in one of the ranks.
        ValueError: ``batches`` has no masked token.
    """
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    num_masked = num_pairs = 0
    for i in range(0, len(batches), ranks.world_size):
        # The forward of a sharded model is a collective call: a rank without a batch runs another rank's batch.
        mine = i + ranks.rank < len(batches)
        batch = batches[i + ranks.rank if mine else i]
        with autocast(device, compute_dtype):
            out = model(batch.to(device, non_blocking=True))
        if mine:
            sums += torch.stack([x.double() for x in out])
            num_masked += batch.num_masked
            num_pairs += batch.num_pairs
        if stop is not None:
            interrupts, others = ranks.sum(stop.share())
            if interrupts or others:
                model.train(was_training)
                raise Stopped(interrupts > 0)
    model.train(was_training)
    *totals, masked, pairs = ranks.sum([*sums.tolist(), num_masked, num_pairs])
    num_masked, num_pairs = int(masked), int(pairs)
    if num_masked == 0:
        raise ValueError("there is no masked token to evaluate on: the held-out text is too short")
    mlm_loss, nsp_loss, mlm_correct, nsp_correct = totals
    return Evaluation(
        mlm_loss=mlm_loss / num_masked,
        mlm_accuracy=mlm_correct / num_masked,
        nsp_loss=nsp_loss / num_pairs if num_pairs else None,
        nsp_accuracy=nsp_correct / num_pairs if num_pairs else None,
        num_masked=num_masked,
        num_pairs=num_pairs,
    )
