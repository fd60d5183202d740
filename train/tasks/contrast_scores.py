"""How good vectors are: how near the positives of pairs come, or how the cosine follows the scores of scored pairs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...model.contrastive import Candidates
from .contrast_step import Comparison
from .finetune_report import DEV_COLOR, EXAMPLES, INK, TRAIN_COLOR, shortened
from .pairs import ANCHOR, MISSING, POSITIVE, Pairs
from .rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANKING, SIMILARITY = "ranking", "similarity"
# The first chooses the best model by default.
METRICS = {
    RANKING: ("mrr", "recall_at_1", "recall_at_10", "loss"),
    SIMILARITY: ("spearman", "pearson", "loss"),
}


def ranks(units: torch.Tensor, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each row's positive, from 1, and the nearest negative: int64 [n] both.

    The candidates are the different texts that are a positive or a negative of some row. Those that are no negatives of
    the row (`Candidates`) do not count, a tie counts as nearer, and a row without a negative has the rank 1.

    Args:
        units: [texts, H], of length 1.
        parts: as of `Pairs`.

    Returns:
        The ranks, and the numbers of the nearest negatives; −1 without one.
    """
    anchors, positives = (torch.from_numpy(parts[:, part].copy()) for part in (ANCHOR, POSITIVE))
    others = np.unique(parts[:, POSITIVE:])
    numbers = Candidates(anchors, positives, torch.from_numpy(others[others != MISSING]))
    found, nearest = [], []
    for rows in numbers.blocks():
        similarity = units[anchors[rows]] @ units[numbers.all].T  # [rows, K]
        own = similarity.gather(1, torch.searchsorted(numbers.all, positives[rows])[:, None])
        negatives = similarity.masked_fill(numbers.not_negative(rows), float("-inf"))
        found.append(1 + (negatives >= own).sum(1))
        best = negatives.max(1)
        nearest.append(torch.where(best.values.isinf(), MISSING, numbers.all[best.indices]))
    return torch.cat(found).numpy(), torch.cat(nearest).numpy()


@dataclasses.dataclass(frozen=True)
class PairPredictions:
    """The vectors of a model for dev or test rows. See `task.Predictions`.

    Attributes:
        vectors: float32 [texts, H], of length 1.
        batch_size, temperature: of the loss.
    """

    rows: Sequence[Row]
    pairs: Pairs
    vectors: np.ndarray
    batch_size: int
    temperature: float

    def scores(self) -> dict[str, float]:
        """The `METRICS`. NaN where one is not defined, as a correlation with a constant."""
        from scipy import stats

        if self.pairs.scores is None:
            rank, _ = ranks(torch.from_numpy(self.vectors), self.pairs.parts)
            return {
                "mrr": float((1.0 / rank).mean()),
                "recall_at_1": float((rank <= 1).mean()),
                "recall_at_10": float((rank <= 10).mean()),
                "loss": self._loss(),
            }
        cosines, given = self.cosines(), self.pairs.scores
        several = len(given) > 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # undefined figures are NaN
            return {
                "spearman": float(stats.spearmanr(cosines, given)[0]) if several else math.nan,
                "pearson": float(stats.pearsonr(cosines, given)[0]) if several else math.nan,
                "loss": self._loss(),
            }

    def cosines(self) -> np.ndarray:
        """float32 [n], of the first two texts of each row."""
        one, other = (self.vectors[self.pairs.parts[:, part]] for part in (ANCHOR, POSITIVE))
        product: np.ndarray = (one * other).sum(1)
        return product

    def _loss(self) -> float:
        """The training loss, a mean over the rows, with the batches of a training step in the file's order."""
        comparison, total = Comparison(self.pairs, self.temperature), 0.0
        count = len(self.rows)
        for rows in np.array_split(np.arange(count), -(-count // self.batch_size)):
            places = self.pairs.places(rows)
            vectors = torch.from_numpy(self.vectors[self.pairs.parts[places[:, 0], places[:, 1]]])
            total += float(comparison(vectors, places).loss_sum)
        return total / count

    def per_class(self) -> list[dict[str, Any]]:
        """There are no classes."""
        return []

    def sections(self) -> list[dict[str, Any]]:
        """The rows with the worst and the best vectors."""
        if self.pairs.scores is not None:
            cosines = self.cosines()
            errors = np.abs(cosines - self.pairs.scores)
            order = np.argsort(-errors, kind="stable")
            header = ["text", "text pair", "score", "cosine"]
            figures = [
                [f"{given:.3f}", f"{found:.3f}"] for given, found in zip(self.pairs.scores, cosines, strict=True)
            ]
            chosen = [("Largest errors", order[:EXAMPLES]), ("Smallest errors", order[::-1][:EXAMPLES])]
        else:
            rank, nearest = ranks(torch.from_numpy(self.vectors), self.pairs.parts)
            words = {
                int(number): text
                for row, parts in zip(self.rows, self.pairs.parts, strict=True)
                for number, text in zip(parts, row.texts, strict=False)
            }
            header = ["anchor", "positive", "nearest negative", "rank of the positive"]
            figures = [
                [shortened(words.get(int(number), "")), str(place)] for number, place in zip(nearest, rank, strict=True)
            ]
            order = np.argsort(-rank, kind="stable")
            chosen = [("Positives that are found last", order[:EXAMPLES])]
            chosen.append(("Positives that are found first", order[::-1][:EXAMPLES]))
        return [
            {
                "title": title,
                "header": header,
                "rows": [
                    [shortened(self.rows[i].text), shortened(self.rows[i].pair or ""), *figures[i]] for i in which
                ],
            }
            for title, which in chosen
        ]

    def draw(self, middle: Axes, right: Axes) -> None:
        """Cosines of positives and nearest negatives, and the share found by rank; or cosines against scores."""
        cosines = self.cosines()
        if self.pairs.scores is not None:
            middle.scatter(self.pairs.scores, cosines, s=8, color=DEV_COLOR, alpha=0.5)
            middle.set(xlabel="score", ylabel="cosine")
            middle.set_title("Cosine against score", loc="left", fontweight="bold")
            right.hist(cosines - self.pairs.scores, bins=30, color=TRAIN_COLOR)
            right.set(xlabel="cosine − score", ylabel="pairs")
            right.set_title("Errors", loc="left", fontweight="bold")
            return
        rank, nearest = ranks(torch.from_numpy(self.vectors), self.pairs.parts)
        anchors = self.vectors[self.pairs.parts[:, ANCHOR]]
        has = nearest != MISSING
        negative = (anchors[has] * self.vectors[nearest[has]]).sum(1)
        middle.hist(negative, bins=30, color=TRAIN_COLOR, alpha=0.8, label="nearest negative")
        middle.hist(cosines, bins=30, color=DEV_COLOR, alpha=0.6, label="positive")
        middle.set(xlabel="cosine to the anchor", ylabel="rows")
        middle.set_title("Positives and negatives", loc="left", fontweight="bold")
        middle.legend(frameon=False)
        places = np.arange(1, min(100, int(rank.max())) + 1)
        right.plot(places, [(rank <= place).mean() for place in places], color=INK, marker=".")
        right.set(xlabel="k", ylabel="recall", ylim=(0, 1.02))
        right.set_title("Positives among the first k", loc="left", fontweight="bold")
