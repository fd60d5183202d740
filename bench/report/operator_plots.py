"""Plots of the operators: time over ours, rates under the roofline, rate and memory over a size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..measure.case import BOUND
from ..measure.result import KernelContestant, KernelsResult, KernelTime, PassResult
from .axes import (
    bars_height,
    contestant_styles,
    place_apart,
    plain_ticks,
    rate_unit,
    ratio_axis,
    ratio_bars,
    round_numbers,
    sorted_by_time,
    value_bars,
)
from .theme import Plot, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _whole_passes(result: KernelsResult) -> list[PassResult]:
    """The training pass of each case: forward and backward."""
    return [measured for measured in result.results if measured.pass_name == "forward+backward"]


def _timed(measured: PassResult) -> list[tuple[str, KernelTime]]:
    """Names and times of the contestants that were timed, without bounds."""
    return [(row.name, row.time) for row in measured.contestants if row.time and row.role != BOUND]


def _roofline(result: KernelsResult, figure: Figure, theme: Theme) -> None:
    limits = result.ceilings
    copy, matmul = limits.copy_bytes_per_s, limits.matmul_flops_per_s
    passes = [measured for measured in _whole_passes(result) if measured.floor.flops]
    intensities = [measured.floor.flops / measured.floor.bytes for measured in passes]
    points = [
        (intensity, name, time.flops_per_s)
        for intensity, measured in zip(intensities, passes, strict=True)
        for name, time in _timed(measured)
    ]
    ridge = matmul / copy
    left, right = min([*intensities, ridge]) / 2.2, max([*intensities, ridge]) * 2.2
    scale, unit = rate_unit(matmul)
    bottom, top = min([matmul / 4, *(rate for _, _, rate in points)]) / scale / 1.4, 2 * matmul / scale

    axes: Axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    roof = [copy * left / scale, matmul / scale, matmul / scale]
    axes.plot([left, ridge, right], roof, color=theme.ink, linewidth=1.4)
    axes.annotate(
        f"{limits.dtype} matrix product, {matmul / scale:,.3g} {unit}",
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
    for name, style in contestant_styles(result.results, theme).items():
        its = [(intensity, rate / scale) for intensity, other, rate in points if other == name]
        if its:
            axes.plot(*zip(*its, strict=True), **{**style, "linestyle": ""}, alpha=0.9, label=name)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    # Under each column of points, its case; neighbours are moved apart.
    columns = sorted(zip(intensities, (f"{m.op} {m.case}" for m in passes), strict=True))
    share = [math.log(x / left) / math.log(right / left) for x, _ in columns]
    for at, (intensity, name), place in zip(share, columns, place_apart(share, 0.033, 0.01, 0.99), strict=True):
        axes.axvline(intensity, color=theme.grid, linewidth=0.8, zorder=0)
        axes.plot([at, place], [0, -0.025], transform=axes.transAxes, color=theme.ink, linewidth=0.6, clip_on=False)
        axes.annotate(name, (place, -0.03), xycoords="axes fraction", rotation=90, ha="center", va="top", fontsize=7.5)
    # The axis's own numbers go to the top, out of the way of the names.
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines["top"].set_visible(True)
    plain_ticks(axes.xaxis, round_numbers(left, right))
    plain_ticks(axes.yaxis, round_numbers(bottom, top))
    axes.set_xlabel("intensity of the operation (FLOPs a byte that must move)")
    axes.set_ylabel(unit)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _roofline_share(result: KernelsResult, figure: Figure, theme: Theme) -> None:
    styles = contestant_styles(result.results, theme)
    by_op = _by_op(result.results)
    heights = [len(passes) + 0.5 for passes in by_op.values()]
    panels = figure.subplots(len(by_op), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    handles: dict[str, Any] = {}
    for axes, (op, passes) in zip(panels, by_op.items(), strict=True):
        for i, measured in enumerate(passes):
            axes.axhline(i, color=theme.grid, linewidth=0.8, zorder=0)
            for name, time in _timed(measured):
                style = {**styles[name], "linestyle": ""}
                (handles[name],) = axes.plot(100 * time.roofline, i, **style, alpha=0.9, clip_on=False)
        axes.set_yticks(range(len(passes)), [f"{m.case}, {m.pass_name}" for m in passes], fontsize=8)
        axes.set_ylim(len(passes) - 0.5, -0.5)
        axes.axvline(100, color=theme.ink, linewidth=1, linestyle=":", zorder=1)
        axes.set_title(op)
    highest = max((x.time.roofline for m in result.results for x in m.contestants if x.time), default=1.0)
    panels[-1].set_xlim(0, 104 * max(1.0, highest))
    panels[-1].set_xlabel("% of the roofline")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8)


def _by_op(passes: Sequence[PassResult]) -> dict[str, list[PassResult]]:
    found: dict[str, list[PassResult]] = {}
    for measured in passes:
        found.setdefault(measured.op, []).append(measured)
    return found


def _speed_up(passes: Sequence[PassResult], figure: Figure, theme: Theme) -> None:
    groups = [sorted_by_time(measured.contestants) for measured in passes]
    ratios = [len(rows) + 0.8 for rows in groups]
    panels = list(figure.subplots(len(passes), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0])
    for axes, measured, rows in zip(panels, passes, groups, strict=True):
        ratio_bars(axes, rows, theme, f"{measured.op} {measured.case}, {measured.pass_name}")
    ratio_axis(panels, groups)


def _equal_lengths(result: KernelsResult) -> list[PassResult]:
    """Attention without padding and dropout."""
    return [m for m in result.results if m.op == "attention" and not m.shape["padding"] and not m.dropout]


def _curves(
    axes: Axes,
    passes: Sequence[PassResult],
    x: str,
    read: Callable[[KernelTime], float | None],
    styles: dict[str, Any],
) -> None:
    """A line a contestant: ``read`` over the shape's ``x``; broken where a contestant was not timed."""

    def value(row: KernelContestant) -> float:
        found = read(row.time) if row.time else None
        return math.nan if found is None else found

    for name, style in styles.items():
        points = sorted(
            (measured.shape[x], value(row)) for measured in passes for row in measured.contestants if row.name == name
        )
        if any(math.isfinite(y) for _, y in points):
            axes.plot(*zip(*points, strict=True), **style, label=name)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, sorted({measured.shape[x] for measured in passes}))
    axes.grid(linewidth=0.8)


def _attention_rate(result: KernelsResult, figure: Figure, theme: Theme) -> None:
    passes = _equal_lengths(result)
    styles = contestant_styles(passes, theme)
    scale, unit = rate_unit(result.ceilings.matmul_flops_per_s)
    names = list(dict.fromkeys(measured.pass_name for measured in passes))
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        these = [measured for measured in passes if measured.pass_name == name]
        _curves(axes, these, "longest", lambda time: time.flops_per_s / scale, styles)
        axes.set_title(name)
        axes.set_ylabel(unit)
        axes.set_ylim(0, None)
    panels[-1].set_xlabel("N, tokens in a segment")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def _with_memory(result: KernelsResult) -> list[PassResult]:
    return [
        m
        for m in _whole_passes(result)
        if m.op == "mlm_loss" and any(x.time and x.time.peak_bytes for x in m.contestants)
    ]


def _loss_memory_curve(result: KernelsResult, figure: Figure, theme: Theme) -> None:
    passes = _with_memory(result)
    axes: Axes = figure.subplots()
    _curves(axes, passes, "vocab_size", _gigabytes, contestant_styles(passes, theme))
    sizes = sorted((m.shape["vocab_size"], _logits_gigabytes(m)) for m in passes)
    axes.plot(*zip(*sizes, strict=True), color=theme.ink, linestyle=":", linewidth=1.4, label="float32 logits alone")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain_ticks(axes.yaxis, round_numbers(low, high))
    axes.set_xlabel("vocabulary (words)")
    axes.set_ylabel("peak memory, GB")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _loss_memory_bars(result: KernelsResult, figure: Figure, theme: Theme) -> None:
    measured = _with_memory(result)[0]
    found = [(not x.is_ours, y, x) for x in measured.contestants if x.time and (y := _gigabytes(x.time)) is not None]
    found.sort(key=lambda each: each[:2])
    axes: Axes = figure.subplots()
    value_bars(axes, [x for _, _, x in found], theme, [y for _, y, _ in found], "{:.3g}".format)
    logits = _logits_gigabytes(measured)
    axes.axvline(logits, color=theme.ink, linestyle=":", linewidth=1.4, label=f"float32 logits alone: {logits:.3g} GB")
    axes.set_xlabel("peak memory beyond inputs and weights, GB")
    axes.set_title(f"mlm_loss {measured.case}, {measured.pass_name}")
    figure.legend(loc="outside lower center", fontsize=8)


def _gigabytes(time: KernelTime) -> float | None:
    """Peak memory."""
    return None if time.peak_bytes is None else time.peak_bytes / 1e9


def _logits_gigabytes(measured: PassResult) -> float:
    """The float32 logits of a case of mlm_loss."""
    return 4e-9 * float(measured.shape["vocab_size"] * measured.shape["masked"])


def kernel_plots(result: KernelsResult) -> Iterator[Plot]:
    results = result.results
    if not results:
        return
    legend = 0.2 * math.ceil(len({row.name for measured in results for row in measured.contestants}) / 3)
    for op in dict.fromkeys(measured.op for measured in results):
        passes = [measured for measured in _whole_passes(result) if measured.op == op]
        if passes:
            height = bars_height([measured.contestants for measured in passes])
            caption = f"{op}, forward and backward: how many times as long as ours each contestant takes."
            yield Plot(f"speed-up-{op}", caption, height, functools.partial(_speed_up, passes))
    if any(measured.floor.flops for measured in _whole_passes(result)):
        caption = "Roofline, forward and backward: rates reached under what the machine's measured rates allow."
        yield Plot("roofline", caption, 5.4 + legend, functools.partial(_roofline, result))
    caption = "Share of the roofline that each contestant reaches, operators without matrix products too."
    height = 0.7 + 0.24 * len(results) + 0.45 * len(_by_op(results)) + legend
    yield Plot("roofline-share", caption, height, functools.partial(_roofline_share, result))
    if len({measured.shape["longest"] for measured in _equal_lengths(result)}) > 1:
        panels = len({measured.pass_name for measured in _equal_lengths(result)})
        caption = "Attention's rate over the segment length, no padding, no dropout."
        height = 0.7 + 2.5 * panels + legend
        yield Plot("attention-rate", caption, height, functools.partial(_attention_rate, result))
    with_memory = _with_memory(result)
    if len({measured.shape["vocab_size"] for measured in with_memory}) > 1:
        caption = "Masked-LM loss, forward and backward: peak memory over the size of the vocabulary."
        yield Plot("mlm-loss-memory", caption, 4.0, functools.partial(_loss_memory_curve, result))
    elif with_memory:
        caption = "Masked-LM loss, forward and backward: peak memory."
        height = bars_height([with_memory[0].contestants])
        yield Plot("mlm-loss-memory", caption, height, functools.partial(_loss_memory_bars, result))
