"""The plots of a result. What there is to draw is decided without matplotlib; drawing needs it."""

from __future__ import annotations

from ..measure.result import KernelsResult, ParityResult, QualityResult, Result, StepResult, TrainResult
from .operator_plots import kernel_plots
from .run_plots import parity_plots, quality_plots, step_plots, train_plots
from .theme import Plot


def plots(result: Result) -> list[Plot]:
    """The plots of ``result``; none of a kind that has tables only."""
    if isinstance(result, KernelsResult):
        return list(kernel_plots(result))
    if isinstance(result, StepResult):
        return list(step_plots(result))
    if isinstance(result, TrainResult):
        return list(train_plots(result))
    if isinstance(result, QualityResult):
        return list(quality_plots(result))
    return list(parity_plots(result)) if isinstance(result, ParityResult) else []
