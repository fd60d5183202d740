"""A report's plots: what a result has to draw, decided without matplotlib; drawing needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .operator_plots import kernel_plots
from .paper import Plot
from .run_plots import parity_plots, step_plots, train_plots

PLOTS: dict[str, Callable[[dict[str, Any]], Iterator[Plot]]] = {
    "kernels": kernel_plots,
    "step": step_plots,
    "train": train_plots,
    "train_parity": parity_plots,
}


def plots(result: dict[str, Any]) -> list[Plot]:
    """What a result file has to draw; nothing for kinds that are tables only."""
    make = PLOTS.get(result["kind"])
    return list(make(result)) if make else []


__all__ = ["plots"]
