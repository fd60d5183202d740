"""How good vectors are: how near the positives of pairs come, or how the cosine follows the scores of scored pairs."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ...model.contrastive import Candidates
from .contrast_step import Comparison
from .finetune_report import EXAMPLES, shortened
from .pairs import ANCHOR, MISSING, POSITIVE, Pairs
from .plots import DEV_COLOR, INK, MOST_POINTS, TRAIN_COLOR, draw_pairs
from .rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANKING, SIMILARITY = "ranking", "similarity"
NEAREST = 10  # negatives of a row that recall needs
NO_COSINE = -2.0  # below any
# The first chooses the best model by default.
METRICS = {
    RANKING: ("mrr", "recall_at_1", "recall_at_10", "loss"),
    SIMILARITY: ("spearman", "pearson", "loss"),
}


class Ranking(NamedTuple):
    """Where each row's positive is among its negatives. A tie counts as nearer.

    Attributes:
        ranks: int64 [n], from 1; a row without a negative has 1.
        nearest: int64 [n], the numbers of the nearest negatives; −1 without one.
        similarities: float32 [n, 1 + `NEAREST`], of the positive and of the nearest negatives, the nearest first;
            `NO_COSINE` where there are fewer.
    """

    ranks: np.ndarray
    nearest: np.ndarray
    similarities: np.ndarray


def rank_positives(units: torch.Tensor, parts: np.ndarray) -> Ranking:
    """The `Ranking` of the positives.

    The candidates are the different texts that are a positive or a negative of some row. Those that are no negatives of
    the row (`Candidates`) do not count.

    Args:
        units: [texts, H], of length 1.
        parts: as of `Pairs`.
    """
    anchors, positives = (torch.from_numpy(parts[:, part].copy()) for part in (ANCHOR, POSITIVE))
    others = np.unique(parts[:, POSITIVE:])
    numbers = Candidates(anchors, positives, torch.from_numpy(others[others != MISSING]))
    ranks, nearest, similarities = [], [], []
    for rows in numbers.blocks():
        similarity = units[anchors[rows]] @ units[numbers.all].T  # [rows, K]
        own = similarity.gather(1, torch.searchsorted(numbers.all, positives[rows])[:, None])
        negatives = similarity.masked_fill(numbers.not_negative(rows), NO_COSINE)
        ranks.append(1 + (negatives >= own).sum(1))
        best = negatives.topk(min(NEAREST, negatives.shape[1]))
        nearest.append(torch.where(best.values[:, 0] == NO_COSINE, MISSING, numbers.all[best.indices[:, 0]]))
        missing = own.new_full((len(own), NEAREST - best.values.shape[1]), NO_COSINE)
        similarities.append(torch.cat([own, best.values, missing], 1))
    return Ranking(torch.cat(ranks).numpy(), torch.cat(nearest).numpy(), torch.cat(similarities).float().numpy())


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
        from sklearn.metrics import top_k_accuracy_score

        if self.pairs.scores is None:
            # A row has one positive, the first column; of a tie the last column counts as the nearest.
            similarities, columns = self.ranking.similarities, np.arange(1 + NEAREST)
            right = np.zeros(len(similarities), dtype=np.int64)
            recall = {
                f"recall_at_{k}": float(top_k_accuracy_score(right, similarities, k=k, labels=columns)) for k in (1, 10)
            }
            # scikit-learn's label_ranking_average_precision_score is the same, at milliseconds a row.
            return {"mrr": float((1.0 / self.ranking.ranks).mean()), **recall, "loss": self._loss()}
        cosines, given = self.cosines(), self.pairs.scores
        several = len(given) > 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # undefined figures are NaN
            return {
                "spearman": float(stats.spearmanr(cosines, given)[0]) if several else math.nan,
                "pearson": float(stats.pearsonr(cosines, given)[0]) if several else math.nan,
                "loss": self._loss(),
            }

    @functools.cached_property
    def ranking(self) -> Ranking:
        """Of pairs without scores."""
        return rank_positives(torch.from_numpy(self.vectors), self.pairs.parts)

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
            rank, nearest, _ = self.ranking
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

    def plots(self) -> list[Callable[[Axes], None]]:
        """Cosines of positives and nearest negatives, and the share found by rank; or cosines against scores. The map
        of the first pairs."""
        cosines, scores = self.cosines(), self.pairs.scores
        one, other = (self.vectors[self.pairs.parts[: MOST_POINTS // 2, part]] for part in (ANCHOR, POSITIVE))
        values, meaning = (cosines, "cosine") if scores is None else (scores, "score")
        embedding_map = partial(draw_pairs, one=one, other=other, values=values[: len(one)], meaning=meaning)
        if scores is None:
            return [self._draw_negatives, self._draw_recall, embedding_map]
        return [partial(self._draw_scores, scores=scores), partial(self._draw_errors, scores=scores), embedding_map]

    def _draw_scores(self, axes: Axes, scores: np.ndarray) -> None:
        axes.scatter(scores, self.cosines(), s=8, color=DEV_COLOR, alpha=0.5)
        axes.set(xlabel="score", ylabel="cosine")
        axes.set_title("Cosine against score", loc="left", fontweight="bold")

    def _draw_errors(self, axes: Axes, scores: np.ndarray) -> None:
        axes.hist(self.cosines() - scores, bins=30, color=TRAIN_COLOR)
        axes.set(xlabel="cosine − score", ylabel="pairs")
        axes.set_title("Errors", loc="left", fontweight="bold")

    def _draw_negatives(self, axes: Axes) -> None:
        _, nearest, similarities = self.ranking
        axes.hist(similarities[nearest != MISSING, 1], bins=30, color=TRAIN_COLOR, alpha=0.8, label="nearest negative")
        axes.hist(similarities[:, 0], bins=30, color=DEV_COLOR, alpha=0.6, label="positive")
        axes.set(xlabel="cosine to the anchor", ylabel="rows")
        axes.set_title("Positives and negatives", loc="left", fontweight="bold")
        axes.legend(frameon=False)

    def _draw_recall(self, axes: Axes) -> None:
        axes.ecdf(self.ranking.ranks, color=INK)
        last = max(2, min(100, int(self.ranking.ranks.max())))
        axes.set(xlabel="k", ylabel="recall", xlim=(0.5, last), ylim=(0, 1.02))
        axes.set_title("Positives among the first k", loc="left", fontweight="bold")
