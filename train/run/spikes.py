"""Finds log lines with a training loss far above its recent level."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable

WINDOW = 32  # log lines that the level is the median of
FEWEST = 16  # before that the level is not known
DEVIATIONS = 8.0  # standard deviations, estimated from the median absolute deviation
SMALLEST = 0.05  # of the level: a loss that hardly varies has a deviation near 0
NORMAL = 1.4826  # standard deviation / median absolute deviation of a normal distribution


class Spikes:
    """The recent level of the training loss.

    Median and median absolute deviation, which a spike itself does not move. A loss that stays high is one spike, and
    becomes the level.

    Args:
        losses: of the lines before, oldest first.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._above = False
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> tuple[float, float] | None:
        """Adds the loss of a line; returns the level and the limit that it exceeds if a spike begins with it."""
        found = None
        if len(self._recent) >= FEWEST:
            level = statistics.median(self._recent)
            deviation = NORMAL * statistics.median(abs(each - level) for each in self._recent)
            limit = level + max(DEVIATIONS * deviation, SMALLEST * level)
            found = (level, limit) if loss > limit and not self._above else None
            self._above = loss > limit
        self._recent.append(loss)
        return found
