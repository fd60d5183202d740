"""``fusebert predict`` with a classifier: the class or the value of each text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ...model.heads import MULTI, PROBLEMS, REGRESSION, SINGLE
from ...model.hf.encoders import EncoderFolder
from ..errors import UserError
from .classifier import make_classifier, predict_texts
from .embed import blocks
from .examples import pairs_of
from .labels import Labels
from .models import Machine
from .rows import Columns, read_rows
from .scores import probabilities
from .settings import PredictSettings
from .tokens import TextTokenizer


class LabelPredictor:
    """A model fine-tuned to classify, or to give a number: texts → records.

    Attributes:
        labels: what its outputs mean.
        notes: what to tell the user about the weights.

    Raises:
        UserError, ValueError: the model or an option cannot be used.
    """

    def __init__(self, settings: PredictSettings, machine: Machine, folder: EncoderFolder) -> None:
        if settings.stride is not None:
            raise UserError(f"--stride is not for {settings.model}, which cuts long texts (--seqlen)")
        self._machine = machine
        self._settings = settings
        names = folder.label_names
        (bias_name,) = folder.family.names(folder.config.num_hidden_layers)["out.bias"]
        bias = folder.tensors.get(bias_name)  # [C]
        if bias is None:
            raise UserError(
                f"{settings.model} has no classification head: fine-tune the model first (fusebert finetune)"
            )
        names = names or [f"LABEL_{i}" for i in range(len(bias))]
        if bias.shape != (len(names),):
            raise UserError(f"{settings.model}: the head has {bias.numel()} outputs, but id2label has {len(names)}")
        problem = folder.settings.get("problem_type") or (REGRESSION if len(names) == 1 else SINGLE)
        if problem not in PROBLEMS or (problem == REGRESSION and len(names) > 1):
            raise UserError(f"{settings.model}: problem_type {problem!r} with {len(names)} outputs is not supported")
        self.labels = Labels(problem, tuple(names))
        self._tokenizer = TextTokenizer(folder, settings.seqlen)
        model, self.notes = make_classifier(folder, self.labels, needs=("dense", "out"))
        self._model = model.to(self._machine.device)

    def records(self) -> Iterator[dict[str, Any]]:
        """One record a text of ``settings.input``, in its order. Memory is bounded.

        Raises:
            UserError: a row cannot be used.
        """
        settings = self._settings
        rows = read_rows(settings.input, Columns(text=settings.text, pair=settings.text_pair))
        with tqdm(unit=" texts", dynamic_ncols=True, disable=None) as bar:
            for block in blocks(rows):
                encoded = self._tokenizer([row.text for row in block], pairs_of(block))
                yield from self._described(predict_texts(self._model, encoded, self._machine)[0])
                bar.update(len(block))

    def warnings(self) -> list[str]:
        """What to tell the user about the texts."""
        return list(filter(None, [self._tokenizer.warning()]))

    def _described(self, logits: np.ndarray) -> Iterator[dict[str, Any]]:
        """A record for each row of ``logits``, float32 [n, C]."""
        names, problem = self.labels.names, self.labels.problem
        if problem == REGRESSION:
            yield from ({"value": float(value)} for value in logits[:, 0])
            return
        for row in probabilities(problem, logits):
            shares = {name: float(p) for name, p in zip(names, row, strict=True)}
            if problem == MULTI:
                yield {"labels": [name for name, p in shares.items() if p > 0.5], "probabilities": shares}
            else:
                yield {"label": names[int(row.argmax())], "probabilities": shares}
