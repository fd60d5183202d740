"""The plots of a fine-tuning run's report, each on axes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 10  # of the calibration plot
MOST_CLASSES = 30  # of a confusion matrix
MOST_POINTS = 1000  # of an embedding map
MOST_COLORS = 10  # classes with a colour of their own
TRAIN_COLOR, DEV_COLOR, INK = "#9db8d2", "#c0392b", "#333333"


def draw_f1(axes: Axes, classes: Mapping[str, tuple[float, float]], most: int) -> None:
    """Bars of F1.

    Args:
        classes: name → (F1, how often it is right); the ``most`` frequent are drawn.
    """
    chosen = sorted(classes.items(), key=lambda item: -item[1][1])[:most]
    axes.barh(range(len(chosen)), [f1 for _, (f1, _) in chosen], color=TRAIN_COLOR)
    axes.set_yticks(range(len(chosen)), [name[:18] for name, _ in chosen])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("F1 of the most frequent classes", loc="left", fontweight="bold")


def draw_calibration(axes: Axes, right: np.ndarray, p: np.ndarray) -> None:
    """The share of right predictions by the model's probability.

    Args:
        right: bool [n].
        p: float [n], the probability of each.
    """
    from sklearn.calibration import calibration_curve

    shares, predicted = calibration_curve(right, np.clip(p, 0, 1), n_bins=BINS)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    axes.plot(predicted, shares, color=DEV_COLOR, marker="o")
    axes.set_title("Calibration", loc="left", fontweight="bold")
    axes.set_xlabel("probability of the model")
    axes.set_ylabel("share that is right")


def draw_confusion(axes: Axes, names: Sequence[str], truth: np.ndarray, found: np.ndarray) -> None:
    """How often each class is predicted where each is right; colours are shares of a row.

    Args:
        names: of up to `MOST_CLASSES` classes.
        truth, found: int64 [n].
    """
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(truth, found, labels=range(len(names)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90)
    axes.set_yticks(range(len(names)), shown)
    if len(names) <= 15:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else INK)
    axes.set_title("Confusion matrix", loc="left", fontweight="bold")
    axes.set_xlabel("predicted")
    axes.set_ylabel("given")


def plane(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """``vectors`` on their two principal axes, float [n, 2], and the share of their variance in words.

    Args:
        vectors: float32 [n, H], H at least 2.
    """
    from sklearn.decomposition import PCA

    if len(vectors) < 2:
        return np.zeros((len(vectors), 2)), ""
    pca = PCA(2, random_state=0)
    points: np.ndarray = pca.fit_transform(vectors)
    return points, f"two principal axes, {np.nansum(pca.explained_variance_ratio_):.0%} of the variance"


def draw_classes(axes: Axes, vectors: np.ndarray, names: Sequence[str], right: np.ndarray) -> None:
    """The embedding map of labelled texts: a colour a class, crosses where the prediction is wrong.

    Args:
        vectors: float32 [n, H], of up to `MOST_POINTS` texts.
        names: of their n classes.
        right: bool [n].
    """
    points, words = plane(vectors)
    kinds, counts = np.unique(np.array(names, dtype=object), return_counts=True)
    common = sorted(kinds[np.argsort(-counts, kind="stable")][:MOST_COLORS])
    colors = {name: f"C{i}" for i, name in enumerate(common)}
    if len(kinds) > len(common):
        colors["others"] = "#bbbbbb"
    shown = np.array([name if name in common else "others" for name in names], dtype=object)
    for name, color in colors.items():
        for marker, chosen, label in ((".", right, name[:18]), ("x", ~right, None)):
            which = points[(shown == name) & chosen]
            axes.scatter(*which.T, s=18, marker=marker, color=color, linewidths=1, label=label)
    axes.legend(frameon=False, fontsize="small")
    _name_map(axes, f"{words}; ×: wrong")


def draw_values(axes: Axes, vectors: np.ndarray, values: np.ndarray) -> None:
    """The embedding map of texts with a number each, which is the colour.

    Args:
        vectors: float32 [n, H], of up to `MOST_POINTS` texts.
        values: float [n].
    """
    points, words = plane(vectors)
    drawn = axes.scatter(*points.T, s=10, c=values, cmap="viridis")
    axes.figure.colorbar(drawn, ax=axes, label="given")
    _name_map(axes, words)


def draw_pairs(axes: Axes, one: np.ndarray, other: np.ndarray, values: np.ndarray, meaning: str) -> None:
    """The embedding map of pairs of texts: a line joins a pair, and its colour is a number.

    Args:
        one, other: float32 [n, H], of up to `MOST_POINTS` / 2 pairs.
        values: float [n], of the pairs.
        meaning: of ``values``.
    """
    from matplotlib.collections import LineCollection

    points, words = plane(np.concatenate([one, other]))
    ends = np.stack([points[: len(one)], points[len(one) :]], 1)  # [n, 2, 2]
    lines = LineCollection(list(ends), cmap="viridis", linewidths=0.8, alpha=0.7)
    lines.set_array(values)
    axes.add_collection(lines)
    for side, color, label in ((0, INK, "first text"), (1, DEV_COLOR, "second text")):
        axes.scatter(*ends[:, side].T, s=6, color=color, label=label, zorder=3)
    axes.figure.colorbar(lines, ax=axes, label=meaning)
    axes.legend(frameon=False, fontsize="small")
    _name_map(axes, words)


def _name_map(axes: Axes, words: str) -> None:
    axes.set_title("Embedding map", loc="left", fontweight="bold")
    axes.set(xlabel=words, xticks=[], yticks=[])
