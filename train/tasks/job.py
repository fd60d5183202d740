"""What ``fusebert finetune`` reads before it trains: options, model, texts, labels."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ...model.heads import SINGLE, SequenceClassifier
from ...model.hf.encoders import EncoderFolder
from ...model.hf.save_classifier import copied_tokenizer, save_classifier
from ..errors import UserError
from ..step.step import TrainingStep
from .classifier import make_classifier, predict_logits
from .examples import EpochBatches, Examples, encode_rows, read_all
from .labels import TASKS, Labels
from .models import Machine
from .rows import Columns, Row
from .scores import choose_metric, scores
from .settings import FinetuneSettings
from .tokens import TextTokenizer

MOST_EPOCHS = 10_000  # the order of all is known before the first step


def say(line: str) -> None:
    """Prints a line on stderr, above the progress bar."""
    tqdm.write(f"fusebert: {line}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Job:
    """What the seeds of a run share.

    Attributes:
        folder: of the model to start from.
        tokenizer: files of `copied_tokenizer`.
        dev_rows: the texts of ``dev``.
        test: of --test, or None.
        class_weights: of the C classes, or None.
        metric: on ``dev``, chooses the best model.
    """

    settings: FinetuneSettings
    machine: Machine
    folder: EncoderFolder
    labels: Labels
    tokenizer: dict[str, bytes]
    train: Examples
    dev: Examples
    dev_rows: list[Row]
    test: Examples | None
    class_weights: list[float] | None
    metric: str

    def model(self, seed: int) -> tuple[SequenceClassifier, list[str]]:
        """The model before the first step, on its device, and what to tell the user about its weights."""
        torch.manual_seed(seed)
        model, notes = make_classifier(self.folder, self.labels, self.class_weights)
        frozen = self.settings.freeze_layers
        for part in [model.encoder.embeddings, *model.encoder.layers[:frozen]] if frozen else []:
            part.requires_grad_(False)
        return model.to(self.machine.device), notes

    @property
    def _graph(self) -> bool:
        return self.settings.graph and self.machine.device.type == "cuda"

    def step(self, model: SequenceClassifier, optimizer: torch.optim.Optimizer) -> TrainingStep:
        """See `seed_run.Job`, as for the methods below."""
        dtype, clip = self.machine.compute_dtype, self.settings.clip
        return TrainingStep(model, optimizer, clip=clip, compute_dtype=dtype, graph=self._graph, losses=1)

    def batches(self, seed: int) -> EpochBatches:
        settings, tokens = self.settings, self.machine.tokens_per_batch
        return EpochBatches(self.train, settings.batch_size, tokens, seed, settings.epochs, static=self._graph)

    def scores(self, model: SequenceClassifier) -> dict[str, float]:
        return scores(self.labels, predict_logits(model, self.dev.texts, self.machine), self.dev.labels)

    def save(self, model: SequenceClassifier, folder: Path) -> None:
        save_classifier(model, folder, self.folder, self.labels.names, self.tokenizer)


def check_settings(settings: FinetuneSettings) -> None:
    """Raises UserError if an option has a value that no model and no text allows."""
    if settings.task not in TASKS:
        raise UserError(f"--task must be one of {', '.join(TASKS)}; got {settings.task!r}")
    if settings.label_separator == "":
        raise UserError("--label-separator must not be empty")
    for name in ("label_separator", "class_weights"):
        if settings.task == "regress" and getattr(settings, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --task classify")
    for name, low, high in (("lr", 0.0, 1.0), ("clip", 0.0, 1e9), ("layer_decay", 0.0, 1.0)):
        if not low < getattr(settings, name) <= high:
            given = getattr(settings, name)
            raise UserError(f"--{name.replace('_', '-')} must be above {low:g} and at most {high:g}; got {given}")
    for name in ("warmup", "weight_decay"):
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"--{name.replace('_', '-')} must be from 0 to below 1; got {getattr(settings, name)}")
    if settings.epochs > MOST_EPOCHS:
        raise UserError(f"--epochs must be from 1 to {MOST_EPOCHS:,}; got {settings.epochs:,}")
    if settings.seed + settings.seeds > 1 << 32:
        raise UserError(f"--seed must be below 2³²; got {settings.seed}")


def prepare_job(settings: FinetuneSettings, machine: Machine, folder: EncoderFolder) -> Job:
    """Reads and encodes the texts and their labels.

    Raises:
        UserError: an option does not fit the model or the labels, or a row cannot be used.
    """
    layers = folder.config.num_hidden_layers
    if settings.freeze_layers > layers:
        raise UserError(f"--freeze-layers must be from 0 to {layers}, the model's layers; got {settings.freeze_layers}")
    separator = settings.label_separator
    columns = Columns(
        settings.text, settings.text_pair, settings.label, labelled=True, empty_labels=separator is not None
    )
    train, dev = read_all(settings.train, columns, "--train"), read_all([settings.dev], columns, "--dev")
    test = None if settings.test is None else read_all([settings.test], columns, "--test")
    (head,) = folder.family.names(layers)["out.weight"]
    labels = Labels.of(train, settings.task, separator, folder.label_names if head in folder.tensors else None)
    metric = choose_metric(settings.metric, labels.problem)
    train_labels, dev_labels = labels.encode(train), labels.encode(dev)
    weights = _class_weights(settings.class_weights, labels, train_labels)
    tokenizer = TextTokenizer(folder, settings.seqlen)
    job = Job(
        settings=settings,
        machine=machine,
        folder=folder,
        labels=labels,
        tokenizer=copied_tokenizer(folder.directory, tokenizer.seqlen),
        train=Examples(encode_rows(tokenizer, train), train_labels),
        dev=Examples(encode_rows(tokenizer, dev), dev_labels),
        dev_rows=dev,
        test=None if test is None else Examples(encode_rows(tokenizer, test), labels.encode(test)),
        class_weights=weights,
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
    for name, rows in (("dev", dev), ("test", test or [])):
        if seen := sum((row.text, row.pair) in known for row in rows):
            say(f"warning: {seen:,} of {len(rows):,} {name} texts are training texts too: the scores are too good")
    return job


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
