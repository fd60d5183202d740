"""A report's plots. What there is to draw is decided without matplotlib; drawing needs it.

Ours is blue and thick; peers take the other colours of Okabe and Ito (2008), which stay apart for the colour-blind, and
a marker each, so that nothing rests on colour alone. Every plot can be drawn on light and on dark paper.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .cases import BOUND, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DPI = 6.4, 160  # so narrow that words are still read on a phone
LOSS_POINTS = 60  # of a training run's curve
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


def _plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Exactly these ticks, as plain numbers: a logarithmic axis would write powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _round_numbers(low: float, high: float) -> list[float]:
    """Round numbers of [low, high] for a logarithmic axis, about three to nine of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= 9:
            break
    return found


def _rate_unit(per_s: float) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if per_s >= 1e12 else (1e9, "GFLOP/s")


def _styles(passes: Sequence[dict[str, Any]], theme: Theme) -> dict[str, dict[str, Any]]:
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


def _whole_passes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The training pass of each case: forward and backward."""
    return [measured for measured in result["results"] if measured["pass"] == "forward+backward"]


def _place_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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


# --- rates under the roofline ----------------------------------------------------------------------------------------


def _roofline(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    limits = result["ceilings"]
    copy, matmul = limits["copy_bytes_per_s"], limits["matmul_flops_per_s"]
    passes = [measured for measured in _whole_passes(result) if measured["flops"]]
    intensities = [measured["flops"] / measured["bytes"] for measured in passes]
    points = [
        (intensity, found)
        for intensity, measured in zip(intensities, passes, strict=True)
        for found in measured["contestants"]
        if "timing" in found and found["role"] != BOUND
    ]
    ridge = matmul / copy
    left, right = min([*intensities, ridge]) / 2.2, max([*intensities, ridge]) * 2.2
    scale, unit = _rate_unit(matmul)
    bottom, top = min([matmul / 4, *(found["flops_per_s"] for _, found in points)]) / scale / 1.4, 2 * matmul / scale

    axes: Axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    roof = [copy * left / scale, matmul / scale, matmul / scale]
    axes.plot([left, ridge, right], roof, color=theme.ink, linewidth=1.4)
    axes.annotate(
        f"{limits['dtype']} matrix product, {matmul / scale:,.3g} {unit}",
        (right, matmul / scale),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
    )
    middle = max(math.sqrt(left * ridge), bottom * scale / copy)
    above = math.log(middle / left) > 0.12 * math.log(right / left)  # else the axis is in the way
    axes.annotate(
        f"copy\n{copy / 1e9:,.0f} GB/s",
        (middle, copy * middle / scale),
        xytext=(-5, 3) if above else (6, -3),
        textcoords="offset points",
        ha="right" if above else "left",
        va="bottom" if above else "top",
    )
    for name, style in _styles(result["results"], theme).items():
        its = [(intensity, found["flops_per_s"] / scale) for intensity, found in points if found["name"] == name]
        if its:
            axes.plot(*zip(*its, strict=True), **{**style, "linestyle": ""}, alpha=0.9, label=name)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    # Under each column of points, its case; neighbours are moved apart.
    columns = sorted(zip(intensities, (f"{m['op']} {m['case']}" for m in passes), strict=True))
    share = [math.log(x / left) / math.log(right / left) for x, _ in columns]
    for at, (intensity, name), place in zip(share, columns, _place_apart(share, 0.033, 0.01, 0.99), strict=True):
        axes.axvline(intensity, color=theme.grid, linewidth=0.8, zorder=0)
        axes.plot([at, place], [0, -0.025], transform=axes.transAxes, color=theme.ink, linewidth=0.6, clip_on=False)
        axes.annotate(name, (place, -0.03), xycoords="axes fraction", rotation=90, ha="center", va="top", fontsize=7.5)
    # The axis's own numbers go to the top, out of the way of the names.
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines["top"].set_visible(True)
    _plain_ticks(axes.xaxis, _round_numbers(left, right))
    _plain_ticks(axes.yaxis, _round_numbers(bottom, top))
    axes.set_xlabel("intensity of the operation (FLOPs a byte that must move)")
    axes.set_ylabel(unit)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _roofline_share(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    styles = _styles(result["results"], theme)
    by_op = _by_op(result["results"])
    heights = [len(passes) + 0.5 for passes in by_op.values()]
    panels = figure.subplots(len(by_op), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    handles: dict[str, Any] = {}
    for axes, (op, passes) in zip(panels, by_op.items(), strict=True):
        for i, measured in enumerate(passes):
            axes.axhline(i, color=theme.grid, linewidth=0.8, zorder=0)
            for found in measured["contestants"]:
                if "timing" in found and found["role"] != BOUND:
                    style = {**styles[found["name"]], "linestyle": ""}
                    (handles[found["name"]],) = axes.plot(100 * found["roofline"], i, **style, alpha=0.9, clip_on=False)
        axes.set_yticks(range(len(passes)), [f"{m['case']}, {m['pass']}" for m in passes], fontsize=8)
        axes.set_ylim(len(passes) - 0.5, -0.5)
        axes.axvline(100, color=theme.ink, linewidth=1, linestyle=":", zorder=1)
        axes.set_title(op)
    highest = max((f["roofline"] for m in result["results"] for f in m["contestants"] if "roofline" in f), default=1.0)
    panels[-1].set_xlim(0, 104 * max(1.0, highest))
    panels[-1].set_xlabel("% of the roofline")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8)


def _by_op(passes: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for measured in passes:
        found.setdefault(measured["op"], []).append(measured)
    return found


# --- speed-ups -------------------------------------------------------------------------------------------------------


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], theme: Theme, title: str) -> None:
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


def _ratio_axis(all_axes: Sequence[Axes], groups: Sequence[Sequence[dict[str, Any]]], label: str) -> None:
    """One logarithmic axis for all, wide enough for the values written at the ends of the bars."""
    intervals = [found["ratio_to_ours"] for rows in groups for found in rows if found.get("ratio_to_ours")]
    low = min([1.0, *(x["low"] for x in intervals)])
    high = max([1.5, *(x["high"] for x in intervals)])
    room = (high / low) ** 0.13
    for axes in all_axes:
        axes.set_xscale("log")
        axes.set_xlim(low / room if low < 1 else 0.97, high * room)
        _plain_ticks(axes.xaxis, _round_numbers(*axes.get_xlim()))
    all_axes[-1].set_xlabel(label)


def _speed_up(passes: Sequence[dict[str, Any]], figure: Figure, theme: Theme) -> None:
    groups = [_sorted_by_time(measured["contestants"]) for measured in passes]
    ratios = [len(rows) + 0.8 for rows in groups]
    panels = list(figure.subplots(len(passes), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0])
    for axes, measured, rows in zip(panels, passes, groups, strict=True):
        _bars(axes, rows, theme, f"{measured['op']} {measured['case']}, {measured['pass']}")
    _ratio_axis(panels, groups, "time / ours, with its 95 % interval (right of the line: ours is faster)")


def _sorted_by_time(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours first, then the fastest; what was not timed last."""

    def order(found: dict[str, Any]) -> float:
        if found["role"] == OURS:
            return -1.0
        if "timing" in found:
            return float(found["timing"]["median_ms"])
        return 1 / found["tokens_per_s"] if "tokens_per_s" in found else math.inf

    return sorted(rows, key=order)


# --- curves over a size ----------------------------------------------------------------------------------------------


def _equal_lengths(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Attention without padding and dropout."""
    return [m for m in result["results"] if m["op"] == "attention" and not m["shape"]["padding"] and not m["dropout"]]


def _curves(
    axes: Axes, passes: Sequence[dict[str, Any]], theme: Theme, x: str, y: str, scale: float, styles: dict[str, Any]
) -> None:
    """A line a contestant: ``y`` / scale over the shape's ``x``; broken where it ran and was not right."""
    for name, style in styles.items():
        points = sorted(
            (measured["shape"][x], math.nan if found.get(y) is None else found[y] / scale)
            for measured in passes
            for found in measured["contestants"]
            if found["name"] == name
        )
        if any(math.isfinite(value) for _, value in points):
            axes.plot(*zip(*points, strict=True), **style, label=name)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, sorted({measured["shape"][x] for measured in passes}))
    axes.grid(linewidth=0.8)


def _attention_rate(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    passes = _equal_lengths(result)
    styles = _styles(passes, theme)
    scale, unit = _rate_unit(result["ceilings"]["matmul_flops_per_s"])
    names = list(dict.fromkeys(measured["pass"] for measured in passes))
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        these = [measured for measured in passes if measured["pass"] == name]
        _curves(axes, these, theme, "longest", "flops_per_s", scale, styles)
        axes.set_title(name)
        axes.set_ylabel(unit)
        axes.set_ylim(0, None)
    panels[-1].set_xlabel("N, tokens in a segment")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def _with_memory(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        m
        for m in _whole_passes(result)
        if m["op"] == "mlm_loss" and any(found.get("peak_bytes") for found in m["contestants"])
    ]


def _loss_memory_curve(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    passes = _with_memory(result)
    axes: Axes = figure.subplots()
    _curves(axes, passes, theme, "vocab_size", "peak_bytes", 1e9, _styles(passes, theme))
    sizes = sorted((m["shape"]["vocab_size"], 4e-9 * m["shape"]["vocab_size"] * m["shape"]["masked"]) for m in passes)
    axes.plot(*zip(*sizes, strict=True), color=theme.ink, linestyle=":", linewidth=1.4, label="float32 logits alone")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    _plain_ticks(axes.yaxis, _round_numbers(low, high))
    axes.set_xlabel("vocabulary (words)")
    axes.set_ylabel("peak memory, GB")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _loss_memory_bars(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    measured = _with_memory(result)[0]
    rows = sorted(
        (found for found in measured["contestants"] if found.get("peak_bytes") is not None),
        key=lambda x: (x["role"] != OURS, x["peak_bytes"]),
    )
    axes: Axes = figure.subplots()
    _plain_bars(axes, rows, [x["peak_bytes"] / 1e9 for x in rows], theme, lambda value: f"{value:.3g}")
    logits = 4e-9 * measured["shape"]["vocab_size"] * measured["shape"]["masked"]
    axes.axvline(logits, color=theme.ink, linestyle=":", linewidth=1.4, label=f"float32 logits alone: {logits:.3g} GB")
    axes.set_xlabel("peak memory beyond inputs and weights, GB")
    axes.set_title(f"mlm_loss {measured['case']}, {measured['pass']}")
    figure.legend(loc="outside lower center", fontsize=8)


# --- steps and runs --------------------------------------------------------------------------------------------------


def _plain_bars(
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


def _step_rate(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = _sorted_by_time(result["contestants"])
    axes: Axes = figure.subplots()
    tokens = result["batch"]["tokens"]
    values = [found.get("tokens_per_s") for found in rows]
    # The fastest steps, where the whisker ends.
    ends = [1e3 * tokens / found["timing"]["p10_ms"] if "timing" in found else None for found in rows]
    _plain_bars(axes, rows, values, theme, lambda value: f"{value:,.0f}", ends)
    for i, (found, value, end) in enumerate(zip(rows, values, ends, strict=True)):
        if value is not None and end is not None:
            low = 1e3 * tokens / found["timing"]["p90_ms"]
            spread = [[max(0.0, value - low)], [max(0.0, end - value)]]
            axes.errorbar(value, i, xerr=spread, color=theme.ink, linewidth=1, capsize=2)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("real tokens/s (whiskers: 10th to 90th percentile of the steps)")


def _step_ratio(result: dict[str, Any], figure: Figure, theme: Theme) -> None:
    rows = _sorted_by_time(result["contestants"])
    axes: Axes = figure.subplots()
    _bars(axes, rows, theme, "")
    _ratio_axis([axes], [rows], "time / ours, with its 95 % interval (right of the line: ours is faster)")


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


# --- what there is to draw -------------------------------------------------------------------------------------------


def _bars_height(groups: Sequence[Sequence[Any]]) -> float:
    return 0.6 + sum(0.24 * len(rows) + 0.36 for rows in groups)


def _legend_height(rows: Sequence[dict[str, Any]]) -> float:
    return 0.2 * math.ceil(len({found["name"] for found in rows}) / 3)


def _kernel_plots(result: dict[str, Any]) -> Iterator[Plot]:
    results = result["results"]
    if not results:
        return
    legend = _legend_height([found for measured in results for found in measured["contestants"]])
    for op in dict.fromkeys(measured["op"] for measured in results):
        passes = [measured for measured in _whole_passes(result) if measured["op"] == op]
        if passes:
            height = _bars_height([measured["contestants"] for measured in passes])
            caption = f"{op}, forward and backward: how many times as long as ours each contestant takes."
            yield Plot(f"speed-up-{op}", caption, height, functools.partial(_speed_up, passes))
    if any(measured["flops"] for measured in _whole_passes(result)):
        caption = "Roofline, forward and backward: rates reached under what the machine's measured rates allow."
        yield Plot("roofline", caption, 5.4 + legend, functools.partial(_roofline, result))
    caption = "Share of the roofline that each contestant reaches, operators without matrix products too."
    height = 0.7 + 0.24 * len(results) + 0.45 * len(_by_op(results)) + legend
    yield Plot("roofline-share", caption, height, functools.partial(_roofline_share, result))
    if len({measured["shape"]["longest"] for measured in _equal_lengths(result)}) > 1:
        panels = len({measured["pass"] for measured in _equal_lengths(result)})
        caption = "Attention's rate over the segment length, no padding, no dropout."
        height = 0.7 + 2.5 * panels + legend
        yield Plot("attention-rate", caption, height, functools.partial(_attention_rate, result))
    with_memory = _with_memory(result)
    if len({measured["shape"]["vocab_size"] for measured in with_memory}) > 1:
        caption = "Masked-LM loss, forward and backward: peak memory over the size of the vocabulary."
        yield Plot("mlm-loss-memory", caption, 4.0, functools.partial(_loss_memory_curve, result))
    elif with_memory:
        caption = "Masked-LM loss, forward and backward: peak memory."
        height = _bars_height([with_memory[0]["contestants"]])
        yield Plot("mlm-loss-memory", caption, height, functools.partial(_loss_memory_bars, result))


def _step_plots(result: dict[str, Any]) -> Iterator[Plot]:
    height = _bars_height([result["contestants"]])
    yield Plot(
        "tokens-per-s", "Real tokens a second of a training step.", height, functools.partial(_step_rate, result)
    )
    if any(found.get("ratio_to_ours") for found in result["contestants"]):
        caption = "How many times as long as ours each contestant's step takes."
        yield Plot("speed-up", caption, height, functools.partial(_step_ratio, result))


def _train_plots(result: dict[str, Any]) -> Iterator[Plot]:
    if any(found.get("ratio_to_ours") for found in result["contestants"]):
        caption = "How many times as long as ours each contestant takes for a token."
        height = _bars_height([result["contestants"]])
        yield Plot("speed-up", caption, height, functools.partial(_step_ratio, result))
    if any(found.get("losses") for found in result["contestants"]):
        caption = "Training loss over the same examples, each point a mean of the steps before it."
        yield Plot("losses", caption, 3.4, functools.partial(_train_losses, result))


def _parity_plots(result: dict[str, Any]) -> Iterator[Plot]:
    caption = "Losses on the same batches from the same weights: where the runs are the same, ours covers theirs."
    yield Plot("losses", caption, 3.4, functools.partial(_losses, result))


PLOTS: dict[str, Callable[[dict[str, Any]], Iterator[Plot]]] = {
    "kernels": _kernel_plots,
    "step": _step_plots,
    "train": _train_plots,
    "train_parity": _parity_plots,
}


def plots(result: dict[str, Any]) -> list[Plot]:
    """What a result file has to draw; nothing for kinds that are tables only."""
    make = PLOTS.get(result["kind"])
    return list(make(result)) if make else []


__all__ = ["DARK", "LIGHT", "Plot", "Theme", "plots", "render"]
