"""What tags mean: spans (B-PER, I-PER, O), scored as entities by seqeval, or classes of words, by scikit-learn."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ..labels import MANY_CLASSES
from .sentences import Sentence

ENTITY_METRICS = ("f1", "precision", "recall", "accuracy", "loss")
WORD_METRICS = ("accuracy", "macro_f1", "loss")
OUTSIDE = "O"
_SPAN = re.compile(r"[BIESLU]-.+")
_SEQEVAL = {"L": "E", "U": "S"}  # BILOU's names of the last word, and of a single one


@dataclasses.dataclass(frozen=True)
class TagSet:
    """The tags of a task.

    Attributes:
        names: of the C outputs, in order.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Sequence[Sentence], known: Sequence[str] | None = None) -> TagSet:
        """The tags of the training ``sentences``, sorted.

        Args:
            known: names of the outputs of the model's own head. They are kept if they include all tags.

        Raises:
            UserError: there are fewer than two tags, or so many that the column is another one.
        """
        found = {tag for sentence in sentences for tag in sentence.tags or []}
        if known is not None and found <= set(known) and len(known) > 1:
            return cls(tuple(known))
        if len(found) < 2:
            raise UserError(f"the training files have no two tags to tell apart, only {', '.join(found) or 'none'}")
        words = sum(len(sentence.words) for sentence in sentences)
        if len(found) > MANY_CLASSES and 2 * len(found) > words:
            raise UserError(f"{len(found):,} different tags of {words:,} words are not tags: name the column (--label)")
        return cls(tuple(sorted(found)))

    @property
    def are_spans(self) -> bool:
        """Whether the tags mark spans of words: IOB1, BIO, BIOES or BILOU."""
        return all(name == OUTSIDE or _SPAN.fullmatch(name) for name in self.names)

    def numbers(self, sentence: Sentence) -> np.ndarray:
        """The classes of the words, int64 [words].

        Raises:
            UserError: a tag is not in the training files. The message names file and line.
        """
        number = {name: i for i, name in enumerate(self.names)}
        for word, tag in enumerate(sentence.tags or []):
            if tag not in number:
                shown = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
                where = sentence.where_is(word)
                raise UserError(f"{where}: the tag {tag!r} is not in the training files, which have {shown}")
        return np.array([number[tag] for tag in sentence.tags or []], dtype=np.int64)

    def decode(self, logits: np.ndarray) -> list[str | None]:
        """The tag of each word. Where there are no logits, "O" if the tags mark spans, else None.

        Args:
            logits: float32 [words, C]; NaN for words without a token.
        """
        empty = OUTSIDE if self.are_spans else None
        missing = np.isnan(logits[:, 0])
        best = np.where(missing, 0, np.where(np.isnan(logits), -np.inf, logits).argmax(1))
        return [empty if lost else self.names[i] for i, lost in zip(best, missing, strict=True)]


def entities(tags: Sequence[str]) -> list[dict[str, Any]]:
    """The spans that the tags of one sentence mark: {"type", "start", "end"}, where end is the word after the last.

    A tag I without a span before it begins one, as in conlleval.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    found = get_entities(_as_seqeval(tags))
    return [{"type": kind, "start": int(start), "end": int(end) + 1} for kind, start, end in found]


def entity_scores(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, and accuracy of words, by seqeval."""
    from seqeval.metrics.sequence_labeling import accuracy_score, precision_recall_fscore_support

    given, predicted = ([_as_seqeval(tags) for tags in each] for each in (truth, found))
    with _quiet():
        precision, recall, f1, _ = precision_recall_fscore_support(given, predicted, average="micro", zero_division=0)
        accuracy = accuracy_score([list(tags) for tags in truth], [list(tags) for tags in found])
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": float(accuracy)}


def entity_table(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of the entities of each type, by seqeval."""
    from seqeval.metrics import classification_report

    given, predicted = ([_as_seqeval(tags) for tags in each] for each in (truth, found))
    if not any(tag != OUTSIDE for tags in [*given, *predicted] for tag in tags):
        return []  # seqeval's report needs a type
    with _quiet():
        report = classification_report(given, predicted, output_dict=True, zero_division=0)
    return [
        {
            "class": name,
            **{key: float(row[theirs]) for key, theirs in (("precision", "precision"), ("recall", "recall"))},
            "f1": float(row["f1-score"]),
            "entities": float(row["support"]),
        }
        for name, row in report.items()
        if not name.endswith(" avg")
    ]


def _as_seqeval(tags: Sequence[str]) -> list[str]:
    return [_SEQEVAL.get(tag[0], tag[0]) + tag[1:] if tag != OUTSIDE else tag for tag in tags]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures are 0
        yield
