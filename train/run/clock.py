"""The clock of a run, and what it decides: progress, the end, evaluations and checkpoints."""

from __future__ import annotations

import math
import time

from ..step.distributed import Ranks
from .checkpoint import TrainerState
from .settings import PretrainSettings

EVALUATIONS = 10  # in a run without eval_every
SAVE_SECONDS = 600.0  # between checkpoints in a run without save_every
FINISH_SECONDS = 5.0  # of the minutes, reserved for the last checkpoint, the export, the plot and the report


class Clock:
    """Wall-clock seconds of a run, including its earlier sessions.

    Attributes:
        now: the seconds at the last `read`, from rank 0 and equal in all ranks. All decisions use this value.
        before: seconds of the earlier sessions.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.now = 0.0
        self.before = 0.0
        self._ranks = ranks
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds by the clock of this process."""
        return self.before + time.perf_counter() - self._started

    def share(self) -> float:
        """The value to sum over the ranks to get rank 0's `elapsed`."""
        return self.elapsed() if self._ranks.first else 0.0

    def read(self) -> float:
        """Sets and returns ``now``. A collective call."""
        (self.now,) = self._ranks.sum([self.share()])
        return self.now


class Schedule:
    """Decides, equally in all ranks, how far a run is and what is due.

    Args:
        complete: the run had reached its end before this session.

    Attributes:
        step_s: seconds of a step, measured.
        evaluation_s: seconds of an evaluation, measured.
    """

    def __init__(self, settings: PretrainSettings, state: TrainerState, clock: Clock, complete: bool) -> None:
        self.settings, self.state, self.clock, self.complete = settings, state, clock, complete
        self.step_s = 0.0
        self.evaluation_s = 0.0
        self._evaluate_at = 0.0  # progress
        self._saved_at = 0.0

    def start(self) -> None:
        """Starts the intervals between evaluations and between checkpoints."""
        self.evaluated()
        self.saved()

    def usable_seconds(self) -> float:
        """Seconds of a run with ``minutes`` that are available for training."""
        assert self.settings.minutes is not None
        return 60.0 * self.settings.minutes - FINISH_SECONDS - 1.2 * self.evaluation_s

    def progress(self) -> float:
        """The share of the run that is done in the middle of the next step."""
        if self.settings.steps is not None:
            return (self.state.step + 0.5) / self.settings.steps
        return (self.clock.now + 0.5 * self.step_s) / max(self.usable_seconds(), 1e-9)

    def spent(self) -> float:
        """The share of the run that is over."""
        if self.settings.steps is not None:
            return self.state.step / self.settings.steps
        return self.clock.now / max(self.usable_seconds(), 1e-9)

    def done(self) -> bool:
        """Whether there is no step left, or no time for one."""
        if self.complete:
            return True
        if self.settings.steps is not None:
            return self.state.step >= self.settings.steps
        return self.state.step > 0 and self.clock.now + self.step_s > self.usable_seconds()

    def evaluation_due(self) -> bool:
        """Whether to evaluate after the current step."""
        if self.settings.eval_every is not None:
            return self.state.step % self.settings.eval_every == 0
        return self.progress() >= self._evaluate_at

    def evaluated(self) -> None:
        """Starts the interval to the next evaluation."""
        self._evaluate_at = (math.floor(self.progress() * EVALUATIONS) + 1) / EVALUATIONS

    def save_due(self) -> bool:
        """Whether to write a checkpoint after the current step."""
        if self.settings.save_every is not None:
            return self.state.step % self.settings.save_every == 0
        return self.clock.now - self._saved_at >= SAVE_SECONDS

    def saved(self) -> None:
        """Starts the interval to the next checkpoint."""
        self._saved_at = self.clock.now
