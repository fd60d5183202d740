"""How good predictions are, by scikit-learn and scipy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...model.heads import MULTI, REGRESSION, SINGLE
from ..errors import UserError
from .labels import Labels

# The metrics of each problem; the first chooses the best model by default.
METRICS = {
    SINGLE: ("accuracy", "macro_f1", "mcc", "loss"),
    MULTI: ("micro_f1", "macro_f1", "accuracy", "loss"),
    REGRESSION: ("pearson", "spearman", "rmse", "loss"),
}
LOWER_IS_BETTER = ("loss", "rmse")


def choose_metric(name: str, known: Sequence[str]) -> str:
    """The metric that ``--metric`` names; "auto" is the first of those that are ``known``.

    Raises:
        UserError: there is no such metric, or scikit-learn is not installed.
    """
    try:
        import sklearn.metrics  # noqa: F401 (better now than after the first epoch)
    except ModuleNotFoundError as error:
        raise UserError("fine-tuning needs scikit-learn for its metrics: pip install 'fusebert[tasks]'") from error
    if name not in ("auto", *known):
        raise UserError(f"--metric {name!r} is not known here: choose one of auto, {', '.join(known)}")
    return known[0] if name == "auto" else name


def decisions(problem: str, logits: np.ndarray) -> np.ndarray:
    """The predicted class, int64 [n]; for each class 0 or 1, int64 [n, C]; or the value, float32 [n]."""
    if problem == SINGLE:
        return logits.argmax(1)
    return (logits > 0).astype(np.int64) if problem == MULTI else logits[:, 0]


def probabilities(problem: str, logits: np.ndarray) -> np.ndarray:
    """float32 [n, C]: softmax of the logits, or the sigmoid of each with several classes a text."""
    x = torch.from_numpy(logits)
    return (x.sigmoid() if problem == MULTI else x.softmax(1)).numpy()


def scores(labels: Labels, logits: np.ndarray, truth: torch.Tensor) -> dict[str, float]:
    """The `METRICS` of the problem. NaN where one is not defined, as a correlation with a constant.

    Args:
        logits: float32 [n, C].
        truth: of `Labels.encode`.
    """
    from scipy import stats
    from sklearn import metrics

    x, given = torch.from_numpy(logits), truth.numpy()
    found = decisions(labels.problem, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures are NaN
        if labels.problem == REGRESSION:
            error = float(F.mse_loss(x[:, 0], truth))
            several = len(given) > 1
            return {
                "pearson": float(stats.pearsonr(found, given)[0]) if several else math.nan,
                "spearman": float(stats.spearmanr(found, given)[0]) if several else math.nan,
                "rmse": float(metrics.root_mean_squared_error(given, found)),
                "loss": error,
            }
        macro = float(metrics.f1_score(given, found, average="macro", zero_division=0))
        accuracy = float(metrics.accuracy_score(given, found))
        if labels.problem == MULTI:
            micro = float(metrics.f1_score(given, found, average="micro", zero_division=0))
            loss = float(F.binary_cross_entropy_with_logits(x, truth))
            return {"micro_f1": micro, "macro_f1": macro, "accuracy": accuracy, "loss": loss}
        mcc = float(metrics.matthews_corrcoef(given, found))
        return {"accuracy": accuracy, "macro_f1": macro, "mcc": mcc, "loss": float(F.cross_entropy(x, truth))}


def goodness(metric: str, found: Mapping[str, float | None]) -> tuple[float, float]:
    """A key to compare `scores` by: the metric, then the loss. A metric that is not defined is the worst value."""
    value, loss = (x if (x := found[name]) is not None and math.isfinite(x) else None for name in (metric, "loss"))
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    return -math.inf if value is None else sign * value, -math.inf if loss is None else -loss
