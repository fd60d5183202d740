"""Pairs, triplets and scored pairs of texts in memory, and the batches of an epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ...model.text_batch import TextBatch
from ..errors import UserError
from .embed import blocks
from .packing import pack_texts, token_budget
from .rows import Columns, Row
from .settings import FinetuneSettings
from .tokens import EncodedText, TextTokenizer

ANCHOR, POSITIVE, MISSING = 0, 1, -1


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows of texts. Each distinct text is there once.

    Attributes:
        texts: encoded.
        parts: int64 [n, P], the numbers of each row's texts: anchor, positive, negatives; −1 for none.
        scores: float32 [n], how alike the first two are; None for pairs and triplets.
    """

    texts: list[EncodedText]
    parts: np.ndarray
    scores: np.ndarray | None

    def places(self, rows: np.ndarray) -> np.ndarray:
        """int64 [texts, 2]: row and part of each text of ``rows``."""
        where = np.argwhere(self.parts[rows] != MISSING)
        return np.stack([rows[where[:, 0]], where[:, 1]], 1)


def pair_columns(settings: FinetuneSettings) -> Columns:
    """The columns of the files: anchor and positive, or with --label text and text_pair.

    Raises:
        UserError: there are negatives besides scores.
    """
    scored = settings.label is not None
    if scored and settings.negative:
        raise UserError("--negative is for pairs without a score: leave out --label")
    if settings.score_range is not None and not scored:
        raise UserError("--score-range is for scored pairs: name the column of the scores with --label")
    return Columns(
        settings.text or ("text" if scored else "anchor"),
        settings.text_pair or ("text_pair" if scored else "positive"),
        settings.label,
        labelled=scored,
        negatives=tuple(settings.negative or ()),
    )


def score_bounds(given: str | None) -> tuple[float, float]:
    """--score-range as (low, high).

    Raises:
        UserError: it is not LOW:HIGH.
    """
    try:
        low, high = map(float, (given or "0:1").split(":"))
    except ValueError:
        low, high = 0.0, 0.0
    if not -1e9 < low < high < 1e9:
        raise UserError(f"--score-range must be LOW:HIGH with LOW below HIGH, such as 0:5; got {given!r}")
    return low, high


def encode_pairs(tokenizer: TextTokenizer, rows: Sequence[Row], bounds: tuple[float, float], scored: bool) -> Pairs:
    """The rows, encoded.

    Args:
        bounds: of the scores, which become 0 … 1.
        scored: the rows' labels are scores.

    Raises:
        UserError: a text is empty, or a score is not a number within the bounds. The message names file and line.
    """
    numbers: dict[str, int] = {}
    parts = np.full((len(rows), 2 + max(len(row.negatives) for row in rows)), MISSING, dtype=np.int64)
    for i, row in enumerate(rows):
        for j, text in enumerate(row.texts):
            if not text.strip():
                raise UserError(f"{row.where}: the {('text', 'text pair', 'negative')[min(j, 2)]} is empty")
            parts[i, j] = numbers.setdefault(text, len(numbers))
    encoded: list[EncodedText] = []
    for block in blocks(numbers):
        encoded += tokenizer(block)
    scores = np.array([_score(row, bounds) for row in rows], dtype=np.float32) if scored else None
    return Pairs(encoded, parts, scores)


def _score(row: Row, bounds: tuple[float, float]) -> float:
    given: Any = row.label
    try:
        value = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        value = math.nan
    low, high = bounds
    if math.isnan(value):
        raise UserError(f"{row.where}: the score {given!r} is not a number")
    if not low <= value <= high:
        raise UserError(
            f"{row.where}: the score {value:g} is not from {low:g} to {high:g}: give the scores' range, such as "
            "--score-range 0:5"
        )
    return (value - low) / (high - low)


class PairBatches:
    """The steps of a run: about ``batch_size`` rows each, in a new order in each epoch, packed by length.

    The rows of an epoch are divided evenly, so that no step has few negatives.

    Args:
        batch_size: the most rows of a step.
        tokens_per_batch: the most tokens of a micro-batch; a longer text is a micro-batch of its own.
        seed: of the order.

    Attributes:
        steps: of an epoch.
    """

    def __init__(self, pairs: Pairs, batch_size: int, tokens_per_batch: int, seed: int) -> None:
        self._pairs, self._budget, self._seed = pairs, tokens_per_batch, seed
        self.steps = -(-len(pairs.parts) // batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[TextBatch]]:
        """The micro-batches of each step of ``epoch``, from step ``start`` on.

        Their labels are int64 [S, 2]: row and part of each text. ``num_labels`` counts the rows by their anchors.
        """
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._pairs.parts))
        for rows in np.array_split(order, self.steps)[start:]:
            yield pack_rows(self._pairs, rows, self._budget)


def pack_rows(pairs: Pairs, rows: np.ndarray, tokens: int) -> list[TextBatch]:
    """The micro-batches of a step with ``rows``: see `PairBatches.epoch`."""
    places = pairs.places(rows)
    texts = [pairs.texts[pairs.parts[row, part]] for row, part in places]
    window = []
    for chosen in token_budget([len(text) for text in texts], tokens):
        labels = torch.from_numpy(places[chosen])
        batch = pack_texts([texts[i] for i in chosen], labels)
        window.append(dataclasses.replace(batch, num_labels=int((labels[:, 1] == ANCHOR).sum())))
    return window
