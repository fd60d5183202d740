"""Plots of whole steps and training runs: tokens/s, time over ours, losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..measure.case import OURS
from .paper import Plot, Theme, bars, bars_height, plain_bars, ratio_axis, sorted_by_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_POINTS = 60  # of a training run's curve


def _step_rate(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = sorted_by_time(result["contestants"])
    axes: Axes = figure.subplots()
    tokens = result["batch"]["tokens"]
    values = [found.get("tokens_per_s") for found in rows]
    # The fastest steps, where the whisker ends.
    ends = [1e3 * tokens / found["timing"]["p10_ms"] if "timing" in found else None for found in rows]
    plain_bars(axes, rows, values, theme, lambda value: f"{value:,.0f}", ends)
    for i, (found, value, end) in enumerate(zip(rows, values, ends, strict=True)):
        if value is not None and end is not None:
            low = 1e3 * tokens / found["timing"]["p90_ms"]
            spread = [[max(0.0, value - low)], [max(0.0, end - value)]]
            axes.errorbar(value, i, xerr=spread, color=theme.ink, linewidth=1, capsize=2)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("real tokens/s (whiskers: 10th to 90th percentile of the steps)")


def _step_ratio(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    rows = sorted_by_time(result["contestants"])
    axes: Axes = figure.subplots()
    bars(axes, rows, theme, "")
    ratio_axis([axes], [rows], "time / ours, with its 95 % interval (right of the line: ours is faster)")


def _losses(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    axes: Axes = figure.subplots()
    for i, (name, run) in enumerate(result["runs"].items()):
        losses = [math.nan if x is None else x for x in run["losses"]]
        ours = name == "fusebert"
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            color=theme.ours if ours else theme.peers[i - 1],
            linewidth=1.6 if ours else 4,
            alpha=1 if ours else 0.5,
            zorder=3 if ours else 2,
            label=name,
        )
    axes.set_xlabel("optimisation step")
    axes.set_ylabel("loss, nats (masked LM + next sentence)")
    axes.grid(axis="y", linewidth=0.8)
    axes.legend(fontsize=8)


def _train_losses(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    axes: Axes = figure.subplots()
    others = 0
    for found in result["contestants"]:
        losses = found.get("losses")
        if not losses:
            continue
        ours = found["role"] == OURS
        others += not ours
        window = max(1, len(losses) // LOSS_POINTS)
        steps = range(window, len(losses) + 1, window)
        axes.plot(
            steps,
            [_mean(losses[step - window : step]) for step in steps],
            color=theme.ours if ours else theme.peers[others - 1],
            linewidth=2.2 if ours else 1.4,
            zorder=3 if ours else 2,
            label=found["name"],
        )
    axes.set_xlabel("optimisation step")
    axes.set_ylabel("training loss, nats (masked LM + next sentence)")
    axes.grid(axis="y", linewidth=0.8)
    axes.legend(fontsize=8)


def _mean(losses: Sequence[float | None]) -> float:
    return math.nan if None in losses else math.fsum(x for x in losses if x is not None) / len(losses)


def step_plots(result: dict[str, Any]) -> Iterator[Plot]:
    height = bars_height([result["contestants"]])
    yield Plot(
        "tokens-per-s", "Real tokens a second of a training step.", height, functools.partial(_step_rate, result)
    )
    if any(found.get("ratio_to_ours") for found in result["contestants"]):
        caption = "How many times as long as ours each contestant's step takes."
        yield Plot("speed-up", caption, height, functools.partial(_step_ratio, result))


def train_plots(result: dict[str, Any]) -> Iterator[Plot]:
    if any(found.get("ratio_to_ours") for found in result["contestants"]):
        caption = "How many times as long as ours each contestant takes for a token."
        height = bars_height([result["contestants"]])
        yield Plot("speed-up", caption, height, functools.partial(_step_ratio, result))
    if any(found.get("losses") for found in result["contestants"]):
        caption = "Training loss over the same examples, each point a mean of the steps before it."
        yield Plot("losses", caption, 3.4, functools.partial(_train_losses, result))


def parity_plots(result: dict[str, Any]) -> Iterator[Plot]:
    caption = "Losses on the same batches from the same weights: where the runs are the same, ours covers theirs."
    yield Plot("losses", caption, 3.4, functools.partial(_losses, result))


__all__ = ["parity_plots", "step_plots", "train_plots"]
