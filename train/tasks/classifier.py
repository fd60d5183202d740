"""A `SequenceClassifier` from a model's folder, and its predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...model.heads import SequenceClassifier
from ...model.hf.encoders import EncoderFolder
from ..step.step import autocast
from .labels import Labels
from .models import Machine, load
from .packing import pack_texts, token_budget
from .tokens import EncodedText


def make_classifier(
    folder: EncoderFolder,
    labels: Labels,
    class_weights: Sequence[float] | None = None,
    needs: tuple[str, ...] = (),
) -> tuple[SequenceClassifier, list[str]]:
    """The model, with the folder's weights, and what to tell the user about those that do not fit.

    A head that the folder lacks is drawn from torch's generator.

    Args:
        needs: as of `models.load`.

    Raises:
        UserError: a part of ``needs`` is missing, or a weight is not finite.
    """
    model = SequenceClassifier(
        folder.config,
        len(labels.names),
        labels.problem,
        activation=folder.family.activation,
        head_dropout=folder.family.head_dropout_p(folder.settings),
        input_dropout=folder.family.input_dropout,
        class_weights=class_weights,
        embedding_size=folder.embedding_size,
    )
    return model, load(model, folder, needs=needs)


@torch.no_grad()
def predict_texts(
    model: SequenceClassifier, texts: Sequence[EncodedText], machine: Machine, keep: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The logits of all texts, float32 [n, C], and `SequenceClassifier.features` of the first ``keep``, float32 [m, H].

    Both are in the order of ``texts``, which are packed by length. Leaves the model in evaluation mode.
    """
    model.eval()
    keep = min(keep, len(texts))
    logits = np.empty((len(texts), model.out.out_features), dtype=np.float32)
    vectors = np.empty((keep, model.out.in_features), dtype=np.float32)
    for chosen in token_budget([len(text) for text in texts], machine.tokens_per_batch):
        batch = pack_texts([texts[i] for i in chosen]).to(machine.device, non_blocking=True)
        with autocast(machine.device, machine.compute_dtype):
            features = model.features(batch)  # [S, H]
            logits[chosen] = model.out(features).float().cpu().numpy()
        kept = np.flatnonzero(chosen < keep)
        vectors[chosen[kept]] = features[torch.from_numpy(kept).to(features.device)].float().cpu().numpy()
    return logits, vectors
