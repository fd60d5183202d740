"""Plots of whole steps and training runs: tokens/s, time over ours, losses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..measure.result import ParityResult, QualityResult, StepResult, TrainResult
from .axes import bars_height, ratio_axis, ratio_bars, sorted_by_time, value_bars
from .columns import AnyContestant
from .theme import Plot, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_POINTS = 60  # of a training run's curve


def _step_rate(result: StepResult, figure: Figure, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = sorted_by_time(result.contestants)
    # Rate = tokens / time: the 90th percentile of the time is the low end of the rate.
    ends = [(x.time.timing.p90_ms, x.time.timing.p10_ms) if x.time else None for x in rows]
    whiskers = [ms and (1e3 * result.batch.tokens / ms[0], 1e3 * result.batch.tokens / ms[1]) for ms in ends]
    axes: Axes = figure.subplots()
    value_bars(axes, rows, theme, [x.time.tokens_per_s if x.time else None for x in rows], "{:,.0f}".format, whiskers)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("real tokens/s (whiskers: 10th to 90th percentile of the steps)")


def _ratios(contestants: Sequence[AnyContestant], figure: Figure, theme: Theme) -> None:
    rows = sorted_by_time(contestants)
    axes: Axes = figure.subplots()
    ratio_bars(axes, rows, theme, "")
    ratio_axis([axes], [rows])


def _loss_axes(figure: Figure, words: str) -> Axes:
    axes: Axes = figure.subplots()
    axes.set_xlabel("optimisation step")
    axes.set_ylabel(f"{words}, nats (masked LM + next sentence)")
    axes.grid(axis="y", linewidth=0.8)
    return axes


def _losses(result: ParityResult, figure: Figure, theme: Theme) -> None:
    axes = _loss_axes(figure, "loss")
    for i, (name, run) in enumerate(result.runs.items()):
        ours = name == "fusebert"
        axes.plot(
            range(1, len(run.losses) + 1),
            run.losses,
            color=theme.ours if ours else theme.peers[i - 1],
            linewidth=1.6 if ours else 4,
            alpha=1 if ours else 0.5,
            zorder=3 if ours else 2,
            label=name,
        )
    axes.legend(fontsize=8)


def _train_losses(result: TrainResult, figure: Figure, theme: Theme) -> None:
    axes = _loss_axes(figure, "training loss")
    colours = iter(theme.peers)
    for row in result.contestants:
        if row.time is None:
            continue
        losses = row.time.losses
        window = max(1, len(losses) // LOSS_POINTS)
        steps = range(window, len(losses) + 1, window)
        axes.plot(
            steps,
            [math.fsum(losses[step - window : step]) / window for step in steps],
            color=theme.ours if row.is_ours else next(colours),
            linewidth=2.2 if row.is_ours else 1.4,
            zorder=3 if row.is_ours else 2,
            label=row.name,
        )
    axes.legend(fontsize=8)


def _speed_up(contestants: Sequence[AnyContestant], caption: str) -> Iterator[Plot]:
    if any(row.time and row.time.ratio_to_ours for row in contestants):
        yield Plot("speed-up", caption, bars_height([contestants]), functools.partial(_ratios, contestants))


def step_plots(result: StepResult) -> Iterator[Plot]:
    """Tokens/s and time over ours."""
    caption, height = "Real tokens a second of a training step.", bars_height([result.contestants])
    yield Plot("tokens-per-s", caption, height, functools.partial(_step_rate, result))
    yield from _speed_up(result.contestants, "How many times as long as ours each contestant's step takes.")


def train_plots(result: TrainResult) -> Iterator[Plot]:
    """Time over ours and the losses."""
    yield from _speed_up(result.contestants, "How many times as long as ours each contestant takes for a token.")
    if any(row.time for row in result.contestants):
        caption = "Training loss over the same examples, each point a mean of the steps before it."
        yield Plot("losses", caption, 3.4, functools.partial(_train_losses, result))


def parity_plots(result: ParityResult) -> Iterator[Plot]:
    """The losses of all runs."""
    caption = "Losses on the same batches from the same weights: where the runs are the same, ours covers theirs."
    yield Plot("losses", caption, 3.4, functools.partial(_losses, result))


def _recipe_losses(result: QualityResult, figure: Figure, theme: Theme) -> None:
    axes: Axes = figure.subplots()
    colours = [theme.ours, *theme.peers]
    for recipe, colour in zip(result.recipes, itertools.cycle(colours), strict=False):
        for number, run in enumerate(recipe.runs):
            points = run.points[1:]
            tokens, losses = [point.tokens / 1e6 for point in points], [point.mlm_loss for point in points]
            label = None if number else recipe.name
            axes.plot(tokens, losses, color=colour, linewidth=1.4, label=label)
    axes.axhline(result.target, color=theme.neutral, linewidth=1, linestyle="--")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("held-out masked-LM loss, nats")
    axes.legend(fontsize=8)


def _recipe_accuracies(result: QualityResult, figure: Figure, theme: Theme) -> None:
    axes: Axes = figure.subplots()
    colours = itertools.cycle([theme.ours, *theme.peers])
    for row, (recipe, colour) in enumerate(zip(result.recipes, colours, strict=False)):
        found = [x.finetuned_accuracy for x in recipe.runs if x.finetuned_accuracy is not None]
        axes.plot(found, [row] * len(found), "o", color=colour, alpha=0.6)
        if found:
            axes.plot([math.fsum(found) / len(found)], [row], "|", color=colour, markersize=18)
    axes.set_yticks(range(len(result.recipes)), [recipe.name for recipe in result.recipes])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy after fine-tuning")


def quality_plots(result: QualityResult) -> Iterator[Plot]:
    """The held-out losses of all runs, and what the models are good for after fine-tuning."""
    if result.recipes:
        caption = "Held-out loss by tokens, a line a seed; dashed: the target."
        yield Plot("recipes", caption, 3.4, functools.partial(_recipe_losses, result))
    if any(run.finetuned_accuracy is not None for recipe in result.recipes for run in recipe.runs):
        caption = "Accuracy after fine-tuning, a dot a seed; the line is their mean."
        height = 0.8 + 0.35 * len(result.recipes)
        yield Plot("recipes-finetuned", caption, height, functools.partial(_recipe_accuracies, result))
