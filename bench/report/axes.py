"""What the plots share: ticks, the contestants' colours and markers, bars, labels that keep apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..measure.case import BOUND
from ..measure.result import PassResult
from .columns import AnyContestant
from .theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

C = TypeVar("C", bound=AnyContestant)
MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">", "p", "h")


def plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Exactly these ticks, as plain numbers: a logarithmic axis would write powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def round_numbers(low: float, high: float) -> list[float]:
    """Round numbers of [low, high] for a logarithmic axis, about three to nine of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= 9:
            break
    return found


def rate_unit(per_s: float) -> tuple[float, str]:
    """The unit in which to write a rate in FLOP/s: (its size, its name)."""
    return (1e12, "TFLOP/s") if per_s >= 1e12 else (1e9, "GFLOP/s")


def contestant_styles(passes: Sequence[PassResult], theme: Theme) -> dict[str, dict[str, Any]]:
    """Contestant → colour, marker, line; the same in all plots of a result. Ours is on top, a second one hollow."""
    styles: dict[str, dict[str, Any]] = {}
    peers = 0
    for measured in passes:
        ours = 0
        for found in measured.contestants:
            first, name = not ours, found.name
            ours += found.is_ours
            if name in styles:
                continue
            style: dict[str, Any] = {"markerfacecolor": None, "linestyle": "-", "linewidth": 1.2, "zorder": 3}
            if found.is_ours:
                style |= {"color": theme.ours, "marker": "o", "linewidth": 2.4, "zorder": 5, "markersize": 7.5}
                style |= {} if first else {"linestyle": "--", "markerfacecolor": theme.paper}
            elif found.role == BOUND:
                style |= {"color": theme.neutral, "marker": "|", "linestyle": ":", "markersize": 7}
            else:
                colour, marker = theme.peers[peers % len(theme.peers)], MARKERS[peers % len(MARKERS)]
                style |= {"color": colour, "marker": marker, "markersize": 5}
                peers += 1
            styles[name] = style
    return styles


def place_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the sorted ``wanted`` ones, at least ``gap`` apart where [low, high] has room for it."""
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for x in wanted:
        placed.append(max(x, placed[-1] + gap) if placed else max(x, low))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _bars(
    axes: Axes,
    rows: Sequence[AnyContestant],
    theme: Theme,
    values: Sequence[float | None],
    missing: Sequence[str],
    slower: bool,
    left: float = 0.0,
) -> None:
    """A bar a contestant from ``left`` to its value; ``missing`` says why there is none. Names stand at the left.

    Args:
        slower: peers that are faster than ours have their own colour.
    """
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            _beside(axes, left, i, missing[i], color=theme.wrong)
            continue
        bound = row.role == BOUND
        colour = theme.ours if row.is_ours else theme.slower if slower and value < 1 and not bound else theme.neutral
        face, hatch = ("none", "////") if bound else (colour, None)
        axes.barh(i, value - left, left=left, height=0.64, color=face, edgecolor=colour, hatch=hatch)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row.is_ours:
            label.set_color(theme.ours)
            label.set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.8)


def _beside(axes: Axes, x: float, y: float, words: str, *, side: int = 1, **style: Any) -> None:
    """``words`` right (side 1) or left (-1) of a point."""
    align = "left" if side == 1 else "right"
    axes.annotate(words, (x, y), xytext=(4 * side, 0), textcoords="offset points", va="center", ha=align, **style)


def _whisker(axes: Axes, y: float, low: float, value: float, high: float, theme: Theme) -> None:
    spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar(value, y, xerr=spread, color=theme.ink, linewidth=1, capsize=2)


def ratio_bars(axes: Axes, rows: Sequence[AnyContestant], theme: Theme, title: str) -> None:
    """Time over ours, from 1, with its interval and its value."""
    ratios = [row.time.ratio_to_ours if row.time else None for row in rows]
    missing = [f"{row.verdict.status.upper()}: {'no time of ours' if row.time else 'not timed'}" for row in rows]
    _bars(axes, rows, theme, [x and x.median for x in ratios], missing, slower=True, left=1.0)
    for i, x in enumerate(ratios):
        if x is not None:
            _whisker(axes, i, x.low, x.median, x.high, theme)
            edge, side = (x.high, 1) if x.median >= 1 else (x.low, -1)
            _beside(axes, edge, i, f"{x.median:.2f}×", side=side, fontsize=8)
    axes.axvline(1, color=theme.ours, linewidth=1.8, zorder=4)
    axes.set_title(title)


def value_bars(
    axes: Axes,
    rows: Sequence[AnyContestant],
    theme: Theme,
    values: Sequence[float | None],
    words: Callable[[float], str],
    whiskers: Sequence[tuple[float, float] | None] | None = None,
) -> None:
    """Bars from zero with their value in words.

    Args:
        whiskers: (low, high) of each value.
    """
    missing = [f"{row.verdict.status.upper()}: not timed" for row in rows]
    _bars(axes, rows, theme, values, missing, slower=False)
    for i, value in enumerate(values):
        if value is not None:
            low, high = (whiskers and whiskers[i]) or (value, value)
            if whiskers:
                _whisker(axes, i, low, value, high, theme)
            _beside(axes, high, i, words(value), fontsize=8)
    axes.set_xlim(0, 1.18 * max((value for value in values if value is not None), default=1.0))


def ratio_axis(all_axes: Sequence[Axes], groups: Sequence[Sequence[AnyContestant]]) -> None:
    """One logarithmic axis for all, wide enough for the values written at the ends of the bars."""
    intervals = [x.time.ratio_to_ours for rows in groups for x in rows if x.time and x.time.ratio_to_ours]
    low = min([1.0, *(x.low for x in intervals)])
    high = max([1.5, *(x.high for x in intervals)])
    room = (high / low) ** 0.13
    for axes in all_axes:
        axes.set_xscale("log")
        axes.set_xlim(low / room if low < 1 else 0.97, high * room)
        plain_ticks(axes.xaxis, round_numbers(*axes.get_xlim()))
    all_axes[-1].set_xlabel("time / ours, with its 95 % interval (right of the line: ours is faster)")


def sorted_by_time(rows: Sequence[C]) -> list[C]:
    """Ours first, then the fastest; what was not timed last."""

    def order(row: C) -> float:
        return -1.0 if row.is_ours else row.time.timing.median_ms if row.time else math.inf

    return sorted(rows, key=order)


def bars_height(groups: Sequence[Sequence[AnyContestant]]) -> float:
    """Inches of a figure with a panel of bars for each group."""
    return 0.6 + sum(0.24 * len(rows) + 0.36 for rows in groups)
