"""From start and end scores to answers: the n best spans, no answer, and the scores of SQuAD, by torchmetrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .questions import Question
from .windows import Window

NEVER = 1e6  # as a threshold: every question is answered
N_BEST = 20  # starts and ends of a window that are combined, and the most answers to a question


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a context.

    Attributes:
        start, end: its characters.
        score: sum of the logits of its start and its end.
    """

    text: str
    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best spans of a context.

    Attributes:
        spans: with different texts, the best first; none if the context has no token.
        null_score: the lowest sum of the logits of the first token, which stands for "no answer", over the windows.
    """

    spans: tuple[Span, ...]
    null_score: float

    @property
    def text(self) -> str:
        """The best span; "" if there is none."""
        return self.spans[0].text if self.spans else ""

    @property
    def null_margin(self) -> float:
        """By how much "no answer" is better."""
        best = self.spans[0].score if self.spans else -np.inf
        return max(-NEVER, min(NEVER, self.null_score - best))

    def probabilities(self, with_null: bool) -> np.ndarray:
        """float64 [spans + 1]: the softmax of the scores, "no answer" last; without it, its probability is 0."""
        scores = np.array([*(span.score for span in self.spans), self.null_score if with_null else -np.inf])
        powers = np.exp(scores - scores.max()) if np.isfinite(scores.max()) else np.zeros_like(scores)
        shares: np.ndarray = powers / max(powers.sum(), np.finfo(powers.dtype).tiny)
        return shares


def best_answers(
    questions: Sequence[Question], windows: Sequence[Window], logits: Sequence[np.ndarray], longest: int, count: int = 1
) -> list[Answer]:
    """The best answers to each question.

    Args:
        windows: of all questions.
        logits: float32 [tokens, 2] of each window, start and end.
        longest: the most tokens of an answer.
        count: the most spans of an `Answer`, up to `N_BEST`.
    """
    found: list[list[Span]] = [[] for _ in questions]
    nulls = [np.inf] * len(questions)
    for window, scores in zip(windows, logits, strict=True):
        number = window.number
        nulls[number] = min(nulls[number], float(scores[0].sum()))
        found[number] += _spans(questions[number].context, window, scores, longest, count)
    return [Answer(_different(spans, count), null) for spans, null in zip(found, nulls, strict=True)]


def _spans(context: str, window: Window, scores: np.ndarray, longest: int, count: int) -> list[Span]:
    """The ``count`` best spans of a window."""
    if not len(window.offsets):
        return []
    own = scores[window.first : window.first + len(window.offsets)]  # [n, 2]
    starts, ends = (np.argsort(-own[:, side], kind="stable")[:N_BEST] for side in (0, 1))
    sums = own[starts, 0][:, None] + own[ends, 1][None, :]  # [20, 20]
    length = ends[None, :] - starts[:, None] + 1
    sums = np.where((length > 0) & (length <= longest), sums, -np.inf)
    spans = []
    for i, j in zip(*np.unravel_index(np.argsort(-sums, axis=None, kind="stable")[:count], sums.shape), strict=True):
        if np.isfinite(sums[i, j]):
            start, end = int(window.offsets[starts[i], 0]), int(window.offsets[ends[j], 1])
            spans.append(Span(context[start:end], start, end, float(sums[i, j])))
    return spans


def _different(spans: list[Span], count: int) -> tuple[Span, ...]:
    """The ``count`` best spans; of those with the same text, the best one."""
    best: dict[str, Span] = {}
    for span in sorted(spans, key=lambda span: -span.score):
        best.setdefault(span.text, span)
    return tuple(best.values())[:count]


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
