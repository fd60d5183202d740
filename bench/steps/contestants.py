"""What the step, training and parity benchmarks share: one model in our form and in Transformers', and its step.

All contestants of a benchmark start from the weights of one `transformers_bert`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...model import BertConfig, BertForPreTraining, PackedBatch, from_hf
from ...train.step.optim import make_optimizer
from ...train.step.step import TrainingStep
from .transformers_step import TransformersStep

LR, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
FP32_TOLERANCE = 1e-3  # relative difference of two losses of the same function in float32


def preset(model: str, vocab_size: int, *, seqlen: int, dropout: float) -> BertConfig:
    """A preset with positions enough for ``seqlen`` and one dropout probability everywhere."""
    return BertConfig.preset(
        model,
        vocab_size,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=max(512, seqlen),
    )


def our_model(hf: nn.Module, device: torch.device) -> BertForPreTraining:
    """Our model with the weights of Transformers' model ``hf``, in training mode."""
    return from_hf(hf).to(device).train()  # type: ignore[arg-type]


def our_step(model: BertForPreTraining, compute_dtype: torch.dtype, **options: Any) -> TrainingStep:
    """Our training step; ``options`` as for `TrainingStep`."""
    return TrainingStep(
        model, make_optimizer(model, LR, WEIGHT_DECAY), clip=CLIP, compute_dtype=compute_dtype, **options
    )


def our_loss(sums: Tensor, batch: PackedBatch) -> Tensor:
    """Mean over the masked tokens plus mean over the pairs, from the sums of a `TrainingStep`: Transformers' loss."""
    return sums[0] / max(1, batch.num_masked) + sums[1] / max(1, batch.num_pairs)


def their_step(model: nn.Module, compute_dtype: torch.dtype, **options: Any) -> TransformersStep:
    """Transformers' training step; ``options`` as for `TransformersStep`."""
    return TransformersStep(model, lr=LR, weight_decay=WEIGHT_DECAY, clip=CLIP, compute_dtype=compute_dtype, **options)
