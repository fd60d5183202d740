"""The predictions of a model that answers questions: scores, plots, and answers that are right and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..finetune_report import EXAMPLES, TRAIN_COLOR, draw_calibration, shortened
from .answers import Answer
from .questions import Question

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("f1", "exact_match", "loss")


@dataclasses.dataclass(frozen=True)
class AnswerPredictions:
    """See `task.Predictions`.

    Attributes:
        answers: the best span for each question.
        figures: float64 [n, 2], exact match and F1 of what is answered with ``threshold``.
        threshold: as of `SpanPredictor`.
        loss: mean over the windows.
    """

    questions: Sequence[Question]
    answers: Sequence[Answer]
    figures: np.ndarray
    threshold: float
    loss: float

    def scores(self) -> dict[str, float]:
        """Exact match and F1, 0 … 1; those of questions with and without an answer, if there are both kinds."""
        answered = np.array([bool(each.answers) for each in self.questions])
        found = {"f1": float(self.figures[:, 1].mean()), "exact_match": float(self.figures[:, 0].mean())}
        if not answered.all():
            for name, chosen in (("has_answer", answered), ("no_answer", ~answered)):
                exact, f1 = self.figures[chosen].mean(0) if chosen.any() else (np.nan, np.nan)
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
        order = np.argsort([each.null_margin for each in self.answers], kind="stable")
        wrong, right = (order[(self.figures[order, 0] > 0) == kind] for kind in (False, True))
        sections = []
        for title, numbers in (("Wrong, surest answers first", wrong), ("Right, least sure first", right[::-1])):
            rows = [
                [
                    shortened(self.questions[i].question),
                    " / ".join(dict.fromkeys(text for text, _ in self.questions[i].answers)) or "no answer",
                    self.found(i) or "no answer",
                    f"{self.figures[i, 1]:.2f}",
                ]
                for i in map(int, numbers[:EXAMPLES])
            ]
            sections.append({"title": title, "header": ["question", "answers", "predicted", "F1"], "rows": rows})
        return sections

    def draw(self, middle: Axes, right: Axes) -> None:
        """How many questions have which F1, and the calibration of answer against no answer."""
        middle.hist(self.figures[:, 1], bins=20, range=(0, 1), color=TRAIN_COLOR)
        middle.set_title("F1 of the answers", loc="left", fontweight="bold")
        middle.set_xlabel("F1")
        middle.set_ylabel("questions")
        margins = np.clip([each.null_margin for each in self.answers], -50, 50)
        draw_calibration(right, self.figures[:, 0] > 0, 1 / (1 + np.exp(-np.abs(margins))))
