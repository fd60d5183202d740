"""The predictions of a tagger: scores, tables, plots, and sentences that are right and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..finetune_report import EXAMPLES, shortened, words
from ..plots import MOST_CLASSES, draw_calibration, draw_confusion, draw_f1
from .sentences import Sentence
from .tags import TagSet, entities, entity_scores, entity_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class TagPredictions:
    """See `task.Predictions`.

    Attributes:
        sentences: with their tags.
        logits: of each sentence, float32 [words, C]; NaN for words without a token.
    """

    tags: TagSet
    sentences: Sequence[Sentence]
    logits: Sequence[np.ndarray]

    @property
    def truth(self) -> list[list[str]]:
        """The given tags of each sentence."""
        return [sentence.tags or [] for sentence in self.sentences]

    @property
    def found(self) -> list[list[str]]:
        """The predicted tags; "" for a word without a prediction."""
        return [[tag or "" for tag in self.tags.decode(each)] for each in self.logits]

    def _words(self) -> tuple[np.ndarray, np.ndarray]:
        """The logits of the words that have some, and the words' classes."""
        logits = np.concatenate(list(self.logits))  # [W, C]
        classes = np.concatenate([self.tags.numbers(sentence) for sentence in self.sentences])
        seen = ~np.isnan(logits[:, 0])
        return logits[seen], classes[seen]

    def scores(self) -> dict[str, float]:
        """`ENTITY_METRICS` of tags that mark spans, else `WORD_METRICS`. The loss is that of words with a token."""
        from sklearn import metrics

        logits, classes = self._words()
        loss = float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(classes)))
        if self.tags.are_spans:
            return {**entity_scores(self.truth, self.found), "loss": loss}
        given, predicted = ([tag for tags in each for tag in tags] for each in (self.truth, self.found))
        names = sorted({*given, *predicted} - {""})
        macro = metrics.f1_score(given, predicted, labels=names, average="macro", zero_division=0)
        return {"accuracy": float(metrics.accuracy_score(given, predicted)), "macro_f1": float(macro), "loss": loss}

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and number of each type of entity, or of each tag."""
        from sklearn.metrics import precision_recall_fscore_support

        if self.tags.are_spans:
            return entity_table(self.truth, self.found)
        given, predicted = ([tag for tags in each for tag in tags] for each in (self.truth, self.found))
        columns = precision_recall_fscore_support(given, predicted, labels=list(self.tags.names), zero_division=0)
        keys = ("precision", "recall", "f1", "words")
        return [
            {"class": name, **{key: float(value) for key, value in zip(keys, row, strict=True)}}
            for name, row in zip(self.tags.names, zip(*columns, strict=True), strict=True)
        ]

    def sections(self) -> list[dict[str, Any]]:
        """The types; the sentences that are wrong and right."""
        sections = []
        if table := self.per_class():
            title = "Types of entities" if self.tags.are_spans else "Tags"
            rows = [[name, *map(words, row), int(count)] for each in table for name, *row, count in [each.values()]]
            sections.append({"title": title, "header": list(table[0]), "rows": rows})
        truth, found = self.truth, self.found
        sure = [self._confidence(i) for i in range(len(truth))]
        wrong = sorted((i for i in range(len(truth)) if truth[i] != found[i]), key=lambda i: -sure[i])
        right = sorted((i for i in range(len(truth)) if truth[i] == found[i]), key=lambda i: sure[i])
        for title, numbers in (("Wrong, most confident first", wrong), ("Right, least confident first", right)):
            rows = [
                [
                    *(shortened(self._marked(i, tags[i])) for tags in (truth, found)),
                    f"{sure[i]:.0%}",
                ]
                for i in numbers[:EXAMPLES]
            ]
            sections.append({"title": title, "header": ["given", "predicted", "confidence"], "rows": rows})
        return sections

    def _confidence(self, i: int) -> float:
        """The probability of the least sure word of a sentence."""
        seen = self.logits[i][~np.isnan(self.logits[i][:, 0])]
        return float(torch.from_numpy(seen).softmax(1).amax(1).min()) if len(seen) else 0.0

    def _marked(self, i: int, tags: Sequence[str]) -> str:
        """The sentence with its entities in brackets, or with a tag after each word."""
        shown = list(self.sentences[i].words)
        if not self.tags.are_spans:
            return " ".join(f"{word}/{tag}" for word, tag in zip(shown, tags, strict=True))
        for each in entities(tags):
            shown[each["start"]] = "[" + shown[each["start"]]
            shown[each["end"] - 1] += f"]{each['type']}"
        return " ".join(shown)

    def plots(self) -> list[Callable[[Axes], None]]:
        """The confusion matrix of the words' tags, or F1 of many types, and the calibration of the words."""
        logits, classes = self._words()
        p = torch.from_numpy(logits).softmax(1).numpy()
        found = p.argmax(1)
        if len(self.tags.names) <= MOST_CLASSES:
            first: Callable[[Axes], None] = partial(draw_confusion, names=self.tags.names, truth=classes, found=found)
        else:
            table = {each["class"]: (each["f1"], list(each.values())[-1]) for each in self.per_class()}
            first = partial(draw_f1, classes=table, most=MOST_CLASSES)
        return [first, partial(draw_calibration, right=found == classes, p=p.max(1))]
