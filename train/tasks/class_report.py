"""A classification's or a regression's predictions: scores, tables, plots, and texts that are right and wrong.

The plots show what was predicted against what was right, and how often predictions of a confidence are right
(calibration).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...model.heads import MULTI, REGRESSION, SINGLE
from .finetune_report import EXAMPLES, shortened, words
from .labels import Labels
from .plots import (
    DEV_COLOR,
    INK,
    MOST_CLASSES,
    TRAIN_COLOR,
    draw_calibration,
    draw_classes,
    draw_confusion,
    draw_f1,
    draw_values,
)
from .rows import Row
from .scores import decisions, probabilities, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class LabelPredictions:
    """One prediction a text, which is a class, a set of classes, or a number.

    Attributes:
        rows: n texts.
        truth: of `Labels.encode`.
        logits: float32 [n, C].
        vectors: float32 [m, H], what the last layer reads of the first m texts, for the embedding map.
    """

    labels: Labels
    rows: Sequence[Row]
    truth: torch.Tensor
    logits: np.ndarray
    vectors: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.float32))

    @property
    def found(self) -> np.ndarray:
        """`scores.decisions`."""
        return decisions(self.labels.problem, self.logits)

    @property
    def confidence(self) -> np.ndarray:
        """float32 [n]: the probability of the predicted class, or with several classes of the least sure decision."""
        p = probabilities(self.labels.problem, self.logits)
        return p.max(1) if self.labels.problem == SINGLE else np.maximum(p, 1.0 - p).min(1)

    def right(self) -> np.ndarray:
        """bool [n]: texts of which every decision is right."""
        same = self.found == self.truth.numpy()
        return same if same.ndim == 1 else same.all(1)

    def scores(self) -> dict[str, float]:
        """`scores.scores`."""
        return scores(self.labels, self.logits, self.truth)

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and number of texts of each class; none in a regression."""
        from sklearn.metrics import precision_recall_fscore_support

        if self.labels.problem == REGRESSION:
            return []
        numbers = range(len(self.labels.names))
        columns = precision_recall_fscore_support(self.truth.numpy(), self.found, labels=numbers, zero_division=0)
        names = ("precision", "recall", "f1", "texts")
        return [
            {"class": name, **{key: float(value) for key, value in zip(names, row, strict=True)}}
            for name, row in zip(self.labels.names, zip(*columns, strict=True), strict=True)
        ]

    def sections(self) -> list[dict[str, Any]]:
        """The classes; the texts that are wrong and right, or have the largest and smallest errors."""
        return _sections(self)

    def plots(self) -> list[Callable[[Axes], None]]:
        """The confusion matrix or F1, and the calibration; or predicted against given values, and the errors. The map
        of the texts."""
        shown = len(self.vectors)
        truth, found, names = self.truth.numpy(), self.found, self.labels.names
        if self.labels.problem == REGRESSION:
            drawn: list[Callable[[Axes], None]] = [partial(_draw_values, best=self), partial(_draw_errors, best=self)]
            return [*drawn, *([partial(draw_values, vectors=self.vectors, values=truth[:shown])] if shown else [])]
        if self.labels.problem == SINGLE:
            is_right, p = self.right(), self.confidence
            given = [names[i] for i in truth[:shown]]
        else:
            is_right, p = truth.ravel() > 0, probabilities(MULTI, self.logits).ravel()
            given = [", ".join(np.array(names)[row > 0]) or "none" for row in truth[:shown]]
        if self.labels.problem == SINGLE and len(names) <= MOST_CLASSES:
            drawn = [partial(draw_confusion, names=names, truth=truth, found=found)]
        else:
            classes = {each["class"]: (each["f1"], each["texts"]) for each in self.per_class()}
            drawn = [partial(draw_f1, classes=classes, most=MOST_CLASSES)]
        drawn.append(partial(draw_calibration, right=is_right, p=p))
        right = self.right()[:shown]
        return [*drawn, *([partial(draw_classes, vectors=self.vectors, names=given, right=right)] if shown else [])]


def _sections(best: LabelPredictions) -> list[dict[str, Any]]:
    sections = []
    if classes := best.per_class():
        rows = [[name, *map(words, row), int(count)] for each in classes for name, *row, count in [each.values()]]
        sections.append({"title": "Classes", "header": list(classes[0]), "rows": rows})
    if best.labels.problem == REGRESSION:
        errors = np.abs(best.found - best.truth.numpy())
        order = np.argsort(errors, kind="stable")
        chosen = [("Largest errors", order[::-1][:EXAMPLES]), ("Smallest errors", order[:EXAMPLES])]
    else:
        order, right = np.argsort(-best.confidence, kind="stable"), best.right()
        wrong = order[~right[order]]
        chosen = [("Wrong, most confident first", wrong[:EXAMPLES])]
        chosen.append(("Right, least confident first", order[right[order]][::-1][:EXAMPLES]))
    for title, numbers in chosen:
        rows = [_example(best, int(i)) for i in numbers]
        sections.append({"title": title, "header": ["text", "label", "predicted", "confidence"], "rows": rows})
    return sections


def _example(best: LabelPredictions, i: int) -> list[str]:
    row, truth, found, names = best.rows[i], best.truth[i], best.found[i], best.labels.names
    text = row.text if row.pair is None else f"{row.text} — {row.pair}"
    if best.labels.problem == REGRESSION:
        return [shortened(text), f"{float(truth):.3f}", f"{found:.3f}", ""]
    if best.labels.problem == MULTI:
        given, predicted = (
            ", ".join(names[j] for j in np.flatnonzero(np.asarray(each) > 0)) or "none" for each in (truth, found)
        )
    else:
        given, predicted = names[int(truth)], names[int(found)]
    return [shortened(text), given, predicted, f"{best.confidence[i]:.0%}"]


def _draw_values(axes: Axes, best: LabelPredictions) -> None:
    truth = best.truth.numpy()
    axes.scatter(truth, best.found, s=8, color=DEV_COLOR, alpha=0.5)
    axes.axline((float(truth.mean()), float(truth.mean())), slope=1, color=INK, linewidth=1, linestyle="--")
    axes.set_title("Predicted against given", loc="left", fontweight="bold")
    axes.set_xlabel("given")
    axes.set_ylabel("predicted")


def _draw_errors(axes: Axes, best: LabelPredictions) -> None:
    axes.hist(best.found - best.truth.numpy(), bins=30, color=TRAIN_COLOR)
    axes.set_title("Errors", loc="left", fontweight="bold")
    axes.set_xlabel("predicted − given")
    axes.set_ylabel("texts")
