"""The tasks "classify" and "regress": one class, several classes, or a number a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ...model.heads import SINGLE, SequenceClassifier
from ...model.hf.encoders import EncoderFolder
from ...model.hf.save_classifier import copied_tokenizer, save_classifier
from ..errors import UserError
from .class_report import LabelPredictions
from .classifier import make_classifier, predict_texts
from .examples import Examples, encode_rows, read_all
from .labels import Labels
from .models import Machine
from .plots import MOST_POINTS
from .rows import Columns, Row
from .say import say
from .scores import METRICS, choose_metric
from .settings import FinetuneSettings
from .tokens import TextTokenizer


@dataclasses.dataclass(frozen=True)
class ClassifyTask:
    """See `task.Task`.

    Attributes:
        folder: of the model to start from.
        tokenizer: files of `copied_tokenizer`.
        splits: the rows and their encoded texts, of "dev" and, if there are any, of "test".
        class_weights: of the C classes, or None.
    """

    name: str
    machine: Machine
    folder: EncoderFolder
    labels: Labels
    tokenizer: dict[str, bytes]
    train: Examples
    splits: dict[str, tuple[list[Row], Examples]]
    class_weights: list[float] | None
    metric: str

    @property
    def title(self) -> str:
        """See `task.Task`."""
        return f"{self.name}, {len(self.train.texts):,} training texts, {len(self.splits['dev'][0]):,} dev texts"

    def make_model(self, folder: EncoderFolder, trained: bool = False) -> tuple[SequenceClassifier, list[str]]:
        """See `task.Task`."""
        return make_classifier(folder, self.labels, self.class_weights, needs=("dense", "out") if trained else ())

    def predict(self, model: SequenceClassifier, split: str) -> LabelPredictions:
        """See `task.Task`."""
        rows, examples = self.splits[split]
        logits, vectors = predict_texts(model, examples.texts, self.machine, keep=MOST_POINTS)
        return LabelPredictions(self.labels, rows, examples.labels, logits, vectors)

    def save(self, model: SequenceClassifier, directory: Path) -> None:
        """See `task.Task`."""
        save_classifier(model, directory, self.folder, self.labels.names, self.tokenizer)


def read_classify_task(settings: FinetuneSettings, machine: Machine, folder: EncoderFolder) -> ClassifyTask:
    """Reads and encodes the texts and their labels.

    Raises:
        UserError: an option does not fit the labels, or a row cannot be used.
    """
    separator = settings.label_separator
    columns = Columns(
        settings.text, settings.text_pair, settings.label, labelled=True, empty_labels=separator is not None
    )
    train, dev = read_all(settings.train, columns, "--train"), read_all([settings.dev], columns, "--dev")
    test = None if settings.test is None else read_all([settings.test], columns, "--test")
    (head,) = folder.family.names(folder.config.num_hidden_layers)["out.weight"]
    labels = Labels.of(train, settings.task, separator, folder.label_names if head in folder.tensors else None)
    metric = choose_metric(settings.metric, METRICS[labels.problem])
    scored = {"dev": dev} if test is None else {"dev": dev, "test": test}
    train_labels, scored_labels = labels.encode(train), {name: labels.encode(rows) for name, rows in scored.items()}
    tokenizer = TextTokenizer(folder, settings.seqlen)
    task = ClassifyTask(
        name=settings.task,
        machine=machine,
        folder=folder,
        labels=labels,
        tokenizer=copied_tokenizer(folder.directory, tokenizer.seqlen),
        train=Examples(encode_rows(tokenizer, train), train_labels),
        splits={
            name: (rows, Examples(encode_rows(tokenizer, rows), scored_labels[name])) for name, rows in scored.items()
        },
        class_weights=_class_weights(settings.class_weights, labels, train_labels),
        metric=metric,
    )
    known = {(row.text, row.pair) for row in train}
    what = f"{len(labels.names)} classes" if settings.task == "classify" else "a number each"
    say(f"{len(train):,} training texts, {len(dev):,} dev texts, {what}; a text has up to {tokenizer.seqlen} tokens")
    if head in folder.tensors and len(folder.tensors[head]) == len(labels.names):
        others = [name for name in folder.label_names or [] if name not in labels.names]
        note = f", which was for other classes: {', '.join(others[:8])}" if others else ""
        say(f"training starts from the model's own head{note}")
    for warning in filter(None, [tokenizer.warning()]):
        say(warning)
    for name, rows in scored.items():
        if seen := sum((row.text, row.pair) in known for row in rows):
            say(f"warning: {seen:,} of {len(rows):,} {name} texts are training texts too: the scores are too good")
    return task


def _class_weights(given: str | None, labels: Labels, encoded: torch.Tensor) -> list[float] | None:
    """The factor of each class.

    Raises:
        UserError: ``given`` is not understood, or a text has several classes.
    """
    if given is None:
        return None
    if labels.problem != SINGLE:
        raise UserError("--class-weights needs one class a text: leave out --label-separator")
    if given == "balanced":
        counts = torch.bincount(encoded, minlength=len(labels.names)).clamp(min=1)
        weights: list[float] = (len(encoded) / (len(labels.names) * counts.double())).tolist()
        return weights
    factors = dict.fromkeys(labels.names, 1.0)
    for part in given.split(","):
        name, _, number = part.rpartition("=")
        try:
            factors[name] = float(number) if name in factors else -1.0
        except ValueError:
            factors[name] = -1.0
        if not 0.0 <= factors[name] < 1e9:
            raise UserError(
                f"--class-weights {part!r} is not NAME=NUMBER with one of the classes {', '.join(labels.names[:8])}"
            )
    return list(factors.values())
