"""The predictions of a model that answers questions: scores, plots, and answers that are right and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..finetune_report import EXAMPLES, shortened
from ..plots import TRAIN_COLOR, draw_calibration, draw_confusion
from .answers import NEVER, Answer, best_threshold
from .questions import Question

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("f1", "exact_match", "loss")


@dataclasses.dataclass(frozen=True)
class AnswerPredictions:
    """See `task.Predictions`.

    Attributes:
        answers: the best span for each question.
        with_answer, without: float64 [n, 2], exact match and F1 of the best span, and of no answer.
        loss: mean over the windows.
        threshold: as of `SpanPredictor`.
    """

    questions: Sequence[Question]
    answers: Sequence[Answer]
    with_answer: np.ndarray
    without: np.ndarray
    loss: float
    threshold: float = NEVER

    @property
    def margins(self) -> np.ndarray:
        """float64 [n], `Answer.null_margin`."""
        return np.array([each.null_margin for each in self.answers])

    @property
    def figures(self) -> np.ndarray:
        """float64 [n, 2], exact match and F1 of what is answered."""
        return np.where((self.margins > self.threshold)[:, None], self.without, self.with_answer)

    def best_threshold(self) -> float:
        """`answers.best_threshold` for these questions."""
        return best_threshold(self.margins, self.with_answer[:, 1], self.without[:, 1])

    def with_threshold(self, threshold: float) -> AnswerPredictions:
        """The same with another threshold."""
        return dataclasses.replace(self, threshold=threshold)

    def scores(self) -> dict[str, float]:
        """Exact match and F1, 0 … 1; those of questions with and without an answer, if there are both kinds."""
        answered = np.array([bool(each.answers) for each in self.questions])
        figures = self.figures
        found = {"f1": float(figures[:, 1].mean()), "exact_match": float(figures[:, 0].mean())}
        if not answered.all():
            for name, chosen in (("has_answer", answered), ("no_answer", ~answered)):
                exact, f1 = figures[chosen].mean(0) if chosen.any() else (np.nan, np.nan)
                found |= {f"{name}_f1": float(f1), f"{name}_exact": float(exact)}
            found["null_threshold"] = self.threshold
        return {**found, "loss": self.loss}

    def per_class(self) -> list[dict[str, Any]]:
        """None: answers have no classes."""
        return []

    def found(self, i: int) -> str:
        """What is answered; "" for no answer."""
        return "" if self.answers[i].null_margin > self.threshold else self.answers[i].text

    def sections(self) -> list[dict[str, Any]]:
        """Questions that are answered wrongly and rightly."""
        order, figures = np.argsort(self.margins, kind="stable"), self.figures
        wrong, right = (order[(figures[order, 0] > 0) == kind] for kind in (False, True))
        sections = []
        for title, numbers in (("Wrong, surest answers first", wrong), ("Right, least sure first", right[::-1])):
            rows = [
                [
                    shortened(self.questions[i].question),
                    " / ".join(dict.fromkeys(text for text, _ in self.questions[i].answers)) or "no answer",
                    self.found(i) or "no answer",
                    f"{figures[i, 1]:.2f}",
                ]
                for i in map(int, numbers[:EXAMPLES])
            ]
            sections.append({"title": title, "header": ["question", "answers", "predicted", "F1"], "rows": rows})
        return sections

    def plots(self) -> list[Callable[[Axes], None]]:
        """How many questions have which F1, the calibration of answer against no answer, and how often which is given
        and predicted, if both are."""
        margins = np.clip(self.margins, -50, 50)
        drawn: list[Callable[[Axes], None]] = [
            self._draw_f1,
            partial(draw_calibration, right=self.figures[:, 0] > 0, p=1 / (1 + np.exp(-np.abs(margins)))),
        ]
        none = np.array([not each.answers for each in self.questions])
        if none.any():
            predicted = np.array([not self.found(i) for i in range(len(none))])
            names = ("answer", "no answer")
            drawn.append(partial(draw_confusion, names=names, truth=none.astype(int), found=predicted.astype(int)))
        return drawn

    def _draw_f1(self, axes: Axes) -> None:
        axes.hist(self.figures[:, 1], bins=20, range=(0, 1), color=TRAIN_COLOR)
        axes.set_title("F1 of the answers", loc="left", fontweight="bold")
        axes.set_xlabel("F1")
        axes.set_ylabel("questions")
