"""A `SpanPredictor` from a model's folder, and its scores for windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ....model.heads import SpanPredictor, span_loss
from ....model.hf.encoders import EncoderFolder
from ...step.step import autocast
from ..models import Machine, load
from ..packing import pack_texts, token_budget
from .windows import Window


def make_span_predictor(folder: EncoderFolder, trained: bool) -> tuple[SpanPredictor, list[str]]:
    """The model with the folder's weights, and what to tell the user about those that do not fit.

    Args:
        trained: the head must be in the folder; else it is drawn from torch's generator.

    Raises:
        UserError: the head is missing, or a weight is not finite.
    """
    dropout = folder.family.span_dropout_p(folder.settings)
    model = SpanPredictor(folder.config, head_dropout=dropout, embedding_size=folder.embedding_size)
    model.null_threshold = float(folder.settings.get("null_threshold", 0.0))
    return model, load(model, folder, needs=("span_out",) if trained else ())


@torch.no_grad()
def score_windows(
    model: SpanPredictor, windows: Sequence[Window], machine: Machine, labels: Tensor | None = None
) -> tuple[list[np.ndarray], float]:
    """The start and end logits, float32 [tokens, 2] of each window, and the sum of the losses; 0 without ``labels``.

    Leaves the model in evaluation mode.
    """
    model.eval()
    logits: list[np.ndarray] = [np.empty((0, 2), dtype=np.float32)] * len(windows)
    loss = 0.0
    for chosen in token_budget([len(window.text) for window in windows], machine.tokens_per_batch):
        own = None if labels is None else labels[torch.from_numpy(chosen)]
        batch = pack_texts([windows[i].text for i in chosen], own).to(machine.device, non_blocking=True)
        with autocast(machine.device, machine.compute_dtype):
            found = model.logits(batch)  # [T, 2]
        if labels is not None:
            loss += float(span_loss(found, batch).loss_sum)
        parts = np.split(found.cpu().numpy(), batch.cu_seqlens[1:-1].cpu().numpy())
        for i, part in zip(chosen, parts, strict=True):
            logits[i] = part
    return logits, loss
