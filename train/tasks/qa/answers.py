"""From start and end scores to answers: the n best spans, no answer, and the scores of SQuAD, by torchmetrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .questions import Question
from .windows import Window

NEVER = 1e6  # as a threshold: every question is answered
N_BEST = 20  # starts and ends of a window that are combined


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best span of a context.

    Attributes:
        text: it; "" if the context has no token.
        start, end: its characters in the context.
        score: sum of the logits of its start and its end.
        null_score: the lowest such sum of the first token, which stands for "no answer", over the windows.
    """

    text: str
    start: int
    end: int
    score: float
    null_score: float

    @property
    def null_margin(self) -> float:
        """By how much "no answer" is better."""
        return max(-NEVER, min(NEVER, self.null_score - self.score))


def best_answers(
    questions: Sequence[Question], windows: Sequence[Window], logits: Sequence[np.ndarray], longest: int
) -> list[Answer]:
    """The best answer to each question.

    Args:
        windows: of all questions.
        logits: float32 [tokens, 2] of each window, start and end.
        longest: the most tokens of an answer.
    """
    best = [Answer("", 0, 0, -np.inf, np.inf) for _ in questions]
    for window, scores in zip(windows, logits, strict=True):
        number, context = window.number, questions[window.number].context
        before, null = best[number], float(scores[0].sum())
        best[number] = before = dataclasses.replace(before, null_score=min(before.null_score, null))
        if not len(window.offsets):
            continue
        own = scores[window.first : window.first + len(window.offsets)]  # [n, 2]
        starts, ends = (np.argsort(-own[:, side], kind="stable")[:N_BEST] for side in (0, 1))
        sums = own[starts, 0][:, None] + own[ends, 1][None, :]  # [20, 20]
        length = ends[None, :] - starts[:, None] + 1
        sums = np.where((length > 0) & (length <= longest), sums, -np.inf)
        i, j = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[i, j] > before.score:
            start, end = int(window.offsets[starts[i], 0]), int(window.offsets[ends[j], 1])
            best[number] = Answer(context[start:end], start, end, float(sums[i, j]), before.null_score)
    return best


def exact_and_f1(found: str, question: Question) -> tuple[float, float]:
    """Exact match and F1 of one answer, 0 … 1, against the nearest of the question's answers. "" is no answer."""
    from torchmetrics.functional.text import squad

    texts = [text for text, _ in question.answers] or [""]
    target: Any = {"id": "0", "answers": {"text": texts, "answer_start": [0] * len(texts)}}
    scored = squad({"id": "0", "prediction_text": found}, target)
    return float(scored["exact_match"]) / 100.0, float(scored["f1"]) / 100.0


def best_threshold(margins: np.ndarray, with_answer: np.ndarray, without: np.ndarray) -> float:
    """The threshold of the highest mean F1: "no answer" where the margin is above it. Of several, the nearest to 0.

    Args:
        margins: float [n], `Answer.null_margin`.
        with_answer, without: float [n], F1 of the best span, and of no answer.
    """
    order = np.argsort(margins, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((with_answer - without)[order])])  # of answering the first k
    sorted_margins = margins[order]
    between = (sorted_margins[:-1] + sorted_margins[1:]) / 2
    edges = np.concatenate([[sorted_margins[0] - 1.0], between, [sorted_margins[-1] + 1.0]])
    possible = np.concatenate([[True], sorted_margins[1:] > sorted_margins[:-1], [True]])
    gain = np.where(possible, gain, -np.inf)
    tied = np.flatnonzero(gain >= gain.max() - 1e-9)
    return float(edges[tied[np.abs(edges[tied]).argmin()]])
