"""The task "embed": one vector a text, learned from pairs, triplets or scored pairs of texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...model.heads import CachedGradientEncoder
from ...model.hf.encoders import EncoderFolder
from ...model.hf.save_classifier import copied_tokenizer
from ...model.hf.save_sentence_encoder import save_sentence_encoder
from ..errors import UserError
from ..step.step import TrainingStep
from .contrast_scores import METRICS, RANKING, SIMILARITY, PairPredictions
from .contrast_step import Comparison, ContrastiveStep
from .embed import embed_encoded
from .examples import read_all
from .models import Machine, load, sentence_settings
from .pairs import Pairs, encode_pairs, pair_columns, score_bounds
from .rows import Row
from .say import say
from .scores import choose_metric
from .settings import FinetuneSettings
from .tokens import TextTokenizer

TRAINED_POOLINGS = ("mean", "cls", "max")  # those of sentence-transformers


@dataclasses.dataclass(frozen=True)
class ContrastTask:
    """See `task.Task`.

    Attributes:
        folder: of the model to start from.
        tokenizer: files of `copied_tokenizer`.
        seqlen: the most tokens of a text.
        pooling: one of `TRAINED_POOLINGS`.
        normalize: the exported model scales its vectors to length 1.
        splits: the rows and their encoded texts, of "dev" and, if there are any, of "test".
        settings: ``temperature`` and ``batch_size``.
    """

    machine: Machine
    folder: EncoderFolder
    tokenizer: dict[str, bytes]
    seqlen: int
    pooling: str
    normalize: bool
    train: Pairs
    splits: dict[str, tuple[list[Row], Pairs]]
    settings: FinetuneSettings
    metric: str

    @property
    def title(self) -> str:
        """See `task.Task`."""
        return f"embed, {len(self.train.parts):,} training rows, {len(self.splits['dev'][0]):,} dev rows"

    def make_model(self, folder: EncoderFolder, trained: bool = False) -> tuple[CachedGradientEncoder, list[str]]:
        """See `task.Task`."""
        model = CachedGradientEncoder(folder.config, self.pooling, folder.embedding_size)
        return model, load(model, folder)

    def step(self, step: TrainingStep) -> ContrastiveStep:
        """What trains a model of the task."""
        return ContrastiveStep(step, Comparison(self.train, self.settings.temperature))

    def predict(self, model: Any, split: str) -> PairPredictions:
        """See `task.Task`."""
        rows, pairs = self.splits[split]
        vectors = embed_encoded(model, pairs.texts, self.machine, normalize=True)
        return PairPredictions(rows, pairs, vectors, self.settings.batch_size, self.settings.temperature)

    def save(self, model: Any, directory: Path) -> None:
        """See `task.Task`."""
        save_sentence_encoder(
            model, directory, self.folder, self.tokenizer, seqlen=self.seqlen, normalize=self.normalize
        )


def read_contrast_task(settings: FinetuneSettings, machine: Machine, folder: EncoderFolder) -> ContrastTask:
    """Reads and encodes the texts.

    Raises:
        UserError: an option does not fit, or a row cannot be used.
    """
    if settings.pooling not in ("auto", *TRAINED_POOLINGS):
        raise UserError(f"--pooling {settings.pooling!r} is not known here: choose one of auto, mean, cls, max")
    bounds, columns, scored = score_bounds(settings.score_range), pair_columns(settings), settings.label is not None
    metric = choose_metric(settings.metric, METRICS[SIMILARITY if scored else RANKING])
    stated: dict[str, Any] = {}
    if settings.pooling == "auto" or settings.normalize is None:
        stated = sentence_settings(settings.model) or {}
    train, dev = read_all(settings.train, columns, "--train"), read_all([settings.dev], columns, "--dev")
    test = None if settings.test is None else read_all([settings.test], columns, "--test")
    tokenizer = TextTokenizer(folder, settings.seqlen)
    task = ContrastTask(
        machine=machine,
        folder=folder,
        tokenizer=copied_tokenizer(folder.directory, tokenizer.seqlen),
        seqlen=tokenizer.seqlen,
        pooling=stated.get("pooling", "mean") if settings.pooling == "auto" else settings.pooling,
        normalize=stated.get("normalize", True) if settings.normalize is None else settings.normalize,
        train=encode_pairs(tokenizer, train, bounds, scored),
        splits={
            name: (rows, encode_pairs(tokenizer, rows, bounds, scored))
            for name, rows in (("dev", dev), ("test", test))
            if rows is not None
        },
        settings=settings,
        metric=metric,
    )
    if not scored and len({row.pair for row in train}) < 2:
        raise UserError("--train has only one positive text, and no other to tell it from: give more pairs")
    kind = "scored pairs" if scored else f"pairs with {sum(len(row.negatives) for row in train):,} negatives"
    say(
        f"{len(train):,} training {kind}, {len(dev):,} dev rows, {len(task.train.texts):,} different training texts; "
        f"a text has up to {tokenizer.seqlen} tokens; {task.pooling} pooling"
    )
    for warning in filter(None, [tokenizer.warning()]):
        say(warning)
    known = {(row.text, row.pair) for row in train}
    for name, rows in (("dev", dev), ("test", test or [])):
        if seen := sum((row.text, row.pair) in known for row in rows):
            say(f"warning: {seen:,} of {len(rows):,} {name} pairs are training pairs too: the scores are too good")
    return task
