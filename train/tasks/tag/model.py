"""A `TokenClassifier` from a model's folder, its training batches, and its predictions for words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ....model.batch import IGNORE
from ....model.heads import TokenClassifier
from ....model.hf.encoders import EncoderFolder
from ....model.text_batch import TextBatch
from ...step.step import autocast
from ..examples import lengths_of
from ..models import Machine, load
from ..packing import pack_texts, token_budget
from .windows import Window


def make_tagger(folder: EncoderFolder, outputs: int, trained: bool) -> tuple[TokenClassifier, list[str]]:
    """The model with the folder's weights, and what to tell the user about those that do not fit.

    Args:
        outputs: C, the number of tags.
        trained: the head must be in the folder; else it is drawn from torch's generator.

    Raises:
        UserError: the head is missing, or a weight is not finite.
    """
    model = TokenClassifier(
        folder.config,
        outputs,
        head_dropout=folder.family.tag_dropout_p(folder.settings),
        embedding_size=folder.embedding_size,
    )
    return model, load(model, folder, needs=("tag_out",) if trained else ())


@dataclasses.dataclass(frozen=True)
class TagExamples:
    """Windows, and for each the classes of its words, int64 [k]. See `task.TrainingTexts`."""

    windows: list[Window]
    classes: list[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, int64 [n]."""
        return lengths_of([window.text for window in self.windows])

    def pack(self, chosen: np.ndarray, **shape: int) -> TextBatch:
        """A batch with a label for the first token of each word."""
        batch = pack_texts([self.windows[i].text for i in chosen], None, **shape)
        rows = word_rows([self.windows[i] for i in chosen], batch.cu_seqlens)
        labels = torch.full_like(batch.input_ids, IGNORE)
        labels[rows] = torch.from_numpy(np.concatenate([self.classes[i] for i in chosen]))
        return dataclasses.replace(batch, labels=labels, num_labels=len(rows))


def word_rows(windows: Sequence[Window], cu_seqlens: Tensor) -> Tensor:
    """The rows, on the token axis of a batch of ``windows``, of their words: int64 [sum of k]."""
    starts = cu_seqlens.tolist()
    return torch.from_numpy(np.concatenate([window.rows + starts[i] for i, window in enumerate(windows)]))


@torch.no_grad()
def predict_words(
    model: TokenClassifier, windows: Sequence[Window], num_words: Sequence[int], machine: Machine
) -> list[np.ndarray]:
    """float32 [words, C] of each sentence; NaN for words without a token. Leaves the model in evaluation mode.

    Args:
        windows: of all sentences.
        num_words: of each sentence.
    """
    model.eval()
    logits = [np.full((count, model.tag_out.out_features), np.nan, dtype=np.float32) for count in num_words]
    for chosen in token_budget([len(window.text) for window in windows], machine.tokens_per_batch):
        picked = [windows[i] for i in chosen]
        batch = pack_texts([window.text for window in picked])
        rows = word_rows(picked, batch.cu_seqlens)
        with autocast(machine.device, machine.compute_dtype):
            found = model.logits(batch.to(machine.device, non_blocking=True))  # [T, C]
        of_words = found[rows.to(machine.device)].cpu().numpy()
        parts = np.split(of_words, np.cumsum([len(window.rows) for window in picked])[:-1])
        for window, part in zip(picked, parts, strict=True):
            logits[window.sentence][window.words] = part
    return logits
