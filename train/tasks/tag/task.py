"""The task "tag": a class for each word, as of named entities or parts of speech."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ....model.heads import TokenClassifier
from ....model.hf.encoders import EncoderFolder
from ....model.hf.save_classifier import TAGGER, is_for, save_tagger
from ...errors import UserError
from ..models import Machine
from ..say import say
from ..scores import choose_metric
from ..settings import FinetuneSettings
from .model import TagExamples, make_tagger, predict_words
from .report import TagPredictions
from .sentences import Sentence, TagColumns, read_sentences
from .tags import ENTITY_METRICS, WORD_METRICS, TagSet
from .windows import Window, WordTokenizer

Split = tuple[list[Sentence], list[Window]]


@dataclasses.dataclass(frozen=True)
class TagTask:
    """See `task.Task`.

    Attributes:
        folder: of the model to start from.
        tokenizer: the tokenizer's files.
        stride: tokens that windows share; None: the default.
        num_sentences: of the training files.
        splits: sentences and their windows, of "dev" and, if there are any, of "test".
    """

    machine: Machine
    folder: EncoderFolder
    tags: TagSet
    tokenizer: dict[str, bytes]
    stride: int | None
    num_sentences: int
    train: TagExamples
    splits: dict[str, Split]
    metric: str

    @property
    def title(self) -> str:
        """See `task.Task`."""
        return f"tag, {self.num_sentences:,} training sentences, {len(self.splits['dev'][0]):,} dev sentences"

    def make_model(self, folder: EncoderFolder, trained: bool = False) -> tuple[TokenClassifier, list[str]]:
        """See `task.Task`."""
        return make_tagger(folder, len(self.tags.names), trained)

    def predict(self, model: TokenClassifier, split: str) -> TagPredictions:
        """See `task.Task`."""
        sentences, windows = self.splits[split]
        logits = predict_words(model, windows, [len(each.words) for each in sentences], self.machine)
        return TagPredictions(self.tags, sentences, logits)

    def save(self, model: TokenClassifier, directory: Path) -> None:
        """See `task.Task`."""
        save_tagger(model, directory, self.folder, self.tags.names, self.tokenizer, {"stride": self.stride})


def read_tag_task(settings: FinetuneSettings, machine: Machine, folder: EncoderFolder) -> TagTask:
    """Reads and encodes the sentences and their tags.

    Raises:
        UserError: an option does not fit the tags, or a row cannot be used.
    """
    columns = TagColumns(settings.text, settings.label)
    train, dev = _read(settings.train, columns, "--train"), _read([settings.dev], columns, "--dev")
    test = None if settings.test is None else _read([settings.test], columns, "--test")
    tags = TagSet.of(train, folder.label_names if is_for(folder, TAGGER) else None)
    metric = choose_metric(settings.metric, ENTITY_METRICS if tags.are_spans else WORD_METRICS)
    if tags.are_spans:
        try:
            import seqeval  # noqa: F401 (better now than after the first epoch)
        except ModuleNotFoundError as error:
            raise UserError("--task tag needs seqeval for its metrics: pip install 'fusebert[tasks]'") from error
    tokenizer = WordTokenizer(folder, settings.seqlen, settings.stride)

    def encode(sentences: Sequence[Sentence], option: str) -> Split:
        for sentence in sentences:
            tags.numbers(sentence)
        windows = [each for each in tokenizer([each.words for each in sentences]) if len(each.rows)]
        if not windows:
            raise UserError(f"{option} has no word that the model's tokenizer gives a token")
        return list(sentences), windows

    _, windows = encode(train, "--train")
    examples = TagExamples(windows, [tags.numbers(train[each.sentence])[each.words] for each in windows])
    task = TagTask(
        machine=machine,
        folder=folder,
        tags=tags,
        tokenizer=tokenizer.files(),
        stride=settings.stride,
        num_sentences=len(train),
        train=examples,
        splits={
            name: encode(sentences, f"--{name}")
            for name, sentences in (("dev", dev), ("test", test))
            if sentences is not None
        },
        metric=metric,
    )
    say(
        f"{len(train):,} training sentences, {len(dev):,} dev sentences, {len(tags.names)} tags, "
        f"{'which mark spans' if tags.are_spans else 'one a word'}; a window has up to {tokenizer.seqlen} tokens"
    )
    for warning in filter(None, [tokenizer.warning()]):
        say(warning)
    known = {tuple(sentence.words) for sentence in train}
    for name, sentences in (("dev", dev), ("test", test or [])):
        if seen := sum(tuple(sentence.words) in known for sentence in sentences):
            say(
                f"warning: {seen:,} of {len(sentences):,} {name} sentences are training sentences too: the scores are "
                "too good"
            )
    return task


def _read(files: Sequence[str], columns: TagColumns, option: str) -> list[Sentence]:
    sentences = [sentence for file in files for sentence in read_sentences(file, columns) if sentence.words]
    if not sentences:
        raise UserError(f"{option} {' '.join(files)} has no sentences")
    return sentences
