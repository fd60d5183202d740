"""Random labelled texts, and a model, of each task with one label a text, a token, or a span."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fusebert.model.hf.encoders import EncoderFolder
from fusebert.train.tasks.classifier import make_classifier
from fusebert.train.tasks.examples import Examples
from fusebert.train.tasks.labels import Labels
from fusebert.train.tasks.qa.model import make_span_predictor
from fusebert.train.tasks.tag.model import TagExamples, make_tagger
from fusebert.train.tasks.tag.windows import Window
from fusebert.train.tasks.tokens import EncodedText

TASKS = ("classify", "tag", "qa")
CLASSES = ("a", "b", "c")


def examples_of(task: str, count: int, vocabulary: int) -> Any:
    """``count`` texts of 2 to 29 tokens, with labels that depend on the tokens."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, vocabulary, n) for n in rng.integers(2, 30, count)]
    encoded = [EncodedText(each, np.zeros_like(each)) for each in texts]
    if task == "classify":
        return Examples(encoded, torch.tensor([int(each[0]) % 3 for each in texts]))
    if task == "qa":  # every third text has no answer
        spans = [(0, 0) if i % 3 == 0 else sorted(rng.integers(0, len(each), 2)) for i, each in enumerate(texts)]
        return Examples(encoded, torch.tensor(np.array(spans)))
    windows = []
    for i, each in enumerate(encoded):
        rows = np.flatnonzero(rng.random(len(each)) < 0.6)
        rows = rows if len(rows) else np.array([0])
        windows.append(Window(each, i, np.arange(len(rows)), rows))
    return TagExamples(windows, [texts[i][window.rows] % 3 for i, window in enumerate(windows)])


def model_of(task: str, folder: EncoderFolder) -> tuple[Any, list[str]]:
    """The model of ``folder``, and what is told of weights that do not fit."""
    if task == "classify":
        return make_classifier(folder, Labels("single_label_classification", CLASSES))
    return make_tagger(folder, len(CLASSES), trained=False) if task == "tag" else make_span_predictor(folder, False)
