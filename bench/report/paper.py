"""What the plots of a report share: paper, colours, axes, bars.

Ours is blue and thick; peers take the other colours of Okabe and Ito (2008), which stay apart for the colour-blind, and
a marker each, so that nothing rests on colour alone. Every plot can be drawn on light and on dark paper.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..measure.case import BOUND, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DPI = 6.4, 160  # so narrow that words are still read on a phone
MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">", "p", "h")


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a plot: paper, words, lines of the grid, ours, peers, what is wrong."""

    paper: str
    ink: str
    grid: str
    ours: str
    peers: tuple[str, ...]
    neutral: str
    slower: str
    wrong: str


LIGHT = Theme(
    paper="#ffffff",
    ink="#24292f",
    grid="#dde1e6",
    ours="#0072b2",
    peers=("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#555555"),
    neutral="#a9b4bf",
    slower="#e69f00",
    wrong="#b02a00",
)


DARK = Theme(
    paper="#161b22",
    ink="#d7dde4",
    grid="#333b45",
    ours="#56b4e9",
    peers=("#ff8c42", "#2fd3a2", "#e59ac4", "#f0c04a", "#7f9bff", "#c9b458", "#aaaaaa"),
    neutral="#5d6875",
    slower="#e69f00",
    wrong="#ff8066",
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot to be drawn.

    Attributes:
        name: of its file, unique in a result.
        caption: what it shows, in a sentence.
        height: inches.
        draw: draws it.
    """

    name: str
    caption: str
    height: float
    draw: Callable[[Figure, Theme], None]


def render(plot: Plot, theme: Theme) -> bytes:
    """The plot as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(INCHES, plot.height), dpi=DPI, layout="constrained")
        plot.draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
    return (1e12, "TFLOP/s") if per_s >= 1e12 else (1e9, "GFLOP/s")


def contestant_styles(passes: Sequence[dict[str, Any]], theme: Theme) -> dict[str, dict[str, Any]]:
    """Contestant → colour, marker, line; the same in all plots of a result. Ours is on top, a second one hollow."""
    styles: dict[str, dict[str, Any]] = {}
    peers = 0
    for measured in passes:
        ours = 0
        for found in measured["contestants"]:
            first, name = not ours, found["name"]
            ours += found["role"] == OURS
            if name in styles:
                continue
            style: dict[str, Any] = {"markerfacecolor": None, "linestyle": "-", "linewidth": 1.2, "zorder": 3}
            if found["role"] == OURS:
                style |= {"color": theme.ours, "marker": "o", "linewidth": 2.4, "zorder": 5, "markersize": 7.5}
                style |= {} if first else {"linestyle": "--", "markerfacecolor": theme.paper}
            elif found["role"] == BOUND:
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


def bars(axes: Axes, rows: Sequence[dict[str, Any]], theme: Theme, title: str) -> None:
    """Time over ours, a bar a contestant from 1, its interval, its value; what is wrong says so."""
    for i, found in enumerate(rows):
        against = found.get("ratio_to_ours")
        if against is None:
            reason = "no time of ours" if "timing" in found or "tokens_per_s" in found else "not timed"
            words = found["verdict"]["status"].upper() + f": {reason}"
            axes.annotate(words, (1, i), xytext=(4, 0), textcoords="offset points", va="center", color=theme.wrong)
            continue
        value, low, high = against["median"], against["low"], against["high"]
        ours, bound = found["role"] == OURS, found["role"] == BOUND
        colour = theme.ours if ours else theme.slower if value < 1 and not bound else theme.neutral
        axes.barh(
            i,
            value - 1,
            left=1,
            height=0.64,
            color="none" if bound else colour,
            edgecolor=colour,
            hatch="////" if bound else None,
        )
        axes.errorbar(value, i, xerr=[[value - low], [high - value]], color=theme.ink, linewidth=1, capsize=2)
        edge, side, words = (high, 1, "left") if value >= 1 else (low, -1, "right")
        axes.annotate(
            f"{value:.2f}×",
            (edge, i),
            xytext=(4 * side, 0),
            textcoords="offset points",
            va="center",
            ha=words,
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), [found["name"] for found in rows], fontsize=8)
    for label, found in zip(axes.get_yticklabels(), rows, strict=True):
        if found["role"] == OURS:
            label.set_color(theme.ours)
            label.set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=theme.ours, linewidth=1.8, zorder=4)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_title(title)


def ratio_axis(all_axes: Sequence[Axes], groups: Sequence[Sequence[dict[str, Any]]], label: str) -> None:
    """One logarithmic axis for all, wide enough for the values written at the ends of the bars."""
    intervals = [found["ratio_to_ours"] for rows in groups for found in rows if found.get("ratio_to_ours")]
    low = min([1.0, *(x["low"] for x in intervals)])
    high = max([1.5, *(x["high"] for x in intervals)])
    room = (high / low) ** 0.13
    for axes in all_axes:
        axes.set_xscale("log")
        axes.set_xlim(low / room if low < 1 else 0.97, high * room)
        plain_ticks(axes.xaxis, round_numbers(*axes.get_xlim()))
    all_axes[-1].set_xlabel(label)


def plain_bars(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    values: Sequence[float | None],
    theme: Theme,
    words: Callable[[float], str],
    ends: Sequence[float | None] | None = None,
) -> None:
    """Bars from zero with their value, written at ``ends``, by default the bar's; None is what is not right, and says
    so."""
    highest = max((value for value in values if value is not None), default=1.0)
    for i, (found, value, end) in enumerate(zip(rows, values, ends or values, strict=True)):
        if value is None:
            status = found["verdict"]["status"].upper()
            axes.annotate(
                f"{status}: not timed",
                (0, i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=theme.wrong,
            )
            continue
        ours, bound = found["role"] == OURS, found["role"] == BOUND
        colour = theme.ours if ours else theme.neutral
        axes.barh(i, value, height=0.64, color="none" if bound else colour, edgecolor=colour, hatch="////" * bound)
        axes.annotate(
            words(value), (end or value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [found["name"] for found in rows], fontsize=8)
    for label, found in zip(axes.get_yticklabels(), rows, strict=True):
        if found["role"] == OURS:
            label.set_color(theme.ours)
            label.set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * highest)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.8)


def sorted_by_time(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours first, then the fastest; what was not timed last."""

    def order(found: dict[str, Any]) -> float:
        if found["role"] == OURS:
            return -1.0
        if "timing" in found:
            return float(found["timing"]["median_ms"])
        return 1 / found["tokens_per_s"] if "tokens_per_s" in found else math.inf

    return sorted(rows, key=order)


def bars_height(groups: Sequence[Sequence[Any]]) -> float:
    return 0.6 + sum(0.24 * len(rows) + 0.36 for rows in groups)


__all__ = [
    "DARK",
    "LIGHT",
    "Plot",
    "Theme",
    "bars",
    "bars_height",
    "contestant_styles",
    "place_apart",
    "plain_bars",
    "plain_ticks",
    "rate_unit",
    "ratio_axis",
    "render",
    "round_numbers",
    "sorted_by_time",
]
