"""Medians, spreads, ratios and their intervals.

Intervals are bootstraps (Efron 1979): rounds are drawn with replacement, and the quantiles of the medians of many such
draws bound the interval. The generator's seed is fixed: the same samples give the same interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field

import numpy as np

LIMITED_BY_HOST = 0.95  # share of the device's time that the host needs


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call, one sample a round.

    Attributes:
        p10_ms, p90_ms: 10th and 90th percentile of the samples.
        spread: (90th − 10th percentile) / median.
        calls_per_round: calls in a burst.
        host_median_ms: time that the host needed to issue a call.
        host_bound: issuing the calls took as long as running them. Always False on a CPU, where the two are one.
        samples_ms: in the order of the rounds.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    spread: float
    rounds: int
    calls_per_round: int
    host_median_ms: float
    host_bound: bool
    samples_ms: tuple[float, ...] = field(metadata={"digits": 6})

    @classmethod
    def of(cls, samples: Sequence[float], host: Sequence[float], calls: int) -> Timing:
        """The summary of ``samples``. ``host``: the host's time for a call in the same rounds, in milliseconds."""
        p10, median, p90 = (float(x) for x in np.quantile(samples, (0.1, 0.5, 0.9)))
        host_median = float(np.median(host))
        host_bound = list(host) != list(samples) and host_median >= LIMITED_BY_HOST * median
        spread = (p90 - p10) / median
        return cls(median, p10, p90, spread, len(samples), calls, host_median, host_bound, tuple(samples))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times longer one contestant takes than another, with a confidence interval."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much larger one score is than another on average, with the 95 % interval of Student's paired t."""

    mean: float
    low: float
    high: float


def paired_difference(ones: Sequence[float], others: Sequence[float]) -> Difference:
    """``ones`` − ``others``, pair by pair.

    Raises:
        ValueError: they differ in length, or there are fewer than two pairs.
    """
    from scipy import stats

    if len(ones) != len(others) or len(ones) < 2:
        raise ValueError(f"there must be at least two pairs; got {len(ones)} and {len(others)} scores")
    differences = np.asarray(ones, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    if error == 0.0:
        return Difference(mean, mean, mean)
    low, high = stats.t.interval(0.95, len(differences) - 1, mean, error)
    return Difference(mean, float(low), float(high))


def ratio(numerator: Sequence[float], denominator: Sequence[float], *, resamples: int = 2000) -> Ratio:
    """Median over the rounds of numerator / denominator, and its 95 % bootstrap interval.

    Args:
        numerator, denominator: samples of the same rounds, in the same order.

    Raises:
        ValueError: they are empty or differ in length.
    """
    if len(numerator) != len(denominator) or not numerator:
        raise ValueError(
            f"numerator and denominator must have the same rounds, at least one; got {len(numerator)} and "
            f"{len(denominator)}"
        )
    ratios = np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)
    medians = _medians(ratios, np.random.default_rng(0), resamples)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def ratio_of_runs(old: np.ndarray, new: np.ndarray, confidence: float = 0.95, *, resamples: int = 10000) -> Ratio:
    """Median of ``new`` over median of ``old``, with its bootstrap interval; the rounds are not paired."""
    rng = np.random.default_rng(0)
    ratios = _medians(new, rng, resamples) / _medians(old, rng, resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Ratio(float(np.median(new) / np.median(old)), float(low), float(high))


def _medians(samples: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Medians of ``resamples`` draws of as many samples, with replacement."""
    return np.median(samples[rng.integers(0, len(samples), (resamples, len(samples)))], axis=1)
