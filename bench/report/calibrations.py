"""Tables of `CalibrationResult` and `RaceResult`: what was predicted from compiled code beside what a GPU took."""

from __future__ import annotations

from ..measure.prediction import KernelCalibration, RaceCase, RaceContestant
from ..measure.result import CalibrationResult, RaceResult
from ..measure.statistics import Ratio
from .blocks import Block, Section, Table, Text
from .columns import Column, interval, table

US = "{:,.1f}"
PREDICTED = (
    "Predicted from the code that Triton {triton} compiles: bound if all resources of a launch overlap, sum if none do."
)


def _measured_us(row: KernelCalibration) -> str | None:
    """The median with its interval, in microseconds; the reason where there is none."""
    if row.timing is None:
        return f"FAILED: {row.failed}"
    us = 1e3 * row.timing.median_ms
    if row.over_bound is None:
        return US.format(us)
    low, high = (x * row.prediction.bound_us for x in (row.over_bound.low, row.over_bound.high))
    return f"{us:,.1f} [{low:,.1f}, {high:,.1f}]"


CALIBRATION: tuple[Column[KernelCalibration], ...] = (
    Column("operator", lambda row: row.prediction.call, words=True),
    Column("kernel", lambda row: row.prediction.kernel, words=True),
    Column("launches", lambda row: row.prediction.launches),
    Column("limiter", lambda row: row.prediction.refused or row.prediction.limiter, words=True),
    Column("predicted bound (µs)", lambda row: row.prediction.bound_us or None, US),
    Column("predicted sum (µs)", lambda row: row.prediction.sum_us or None, US),
    Column("measured (µs)", _measured_us),
    Column("measured / bound", lambda row: row.over_bound, interval),
    Column("measured / sum", lambda row: row.over_sum, interval),
)


def calibration_table(result: CalibrationResult) -> Table:
    """A row a kernel."""
    return table(CALIBRATION, result.kernels, bad=lambda row: row.failed is not None)


def calibration_words(result: CalibrationResult) -> str:
    """What was measured, at which rates it was predicted, and what the kernels take of a step."""
    about, of, here = result.about, result.settings, result.ceilings
    lengths = f"ragged ≤ {of.seqlen}" if of.ragged else f"equal, {of.seqlen}"
    words = (
        f"{of.model}, {of.dtype}, lengths {lengths}, {of.tokens:,} token slots, dropout {of.dropout}. "
        f"{PREDICTED.format(triton=about.triton)} Predicted with {about.gpu['name']}'s copies at "
        f"{about.gpu['copy_bytes_per_s'] / 1e12:.3g} TB/s and products at "
        f"{about.gpu['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s; measured here {here.copy_bytes_per_s / 1e12:.3g} and "
        f"{here.matmul_flops_per_s / 1e12:.3g}."
    )
    rows = [row for row in result.kernels if row.timing is not None and not row.prediction.refused]
    if rows:
        bound, total, measured = (
            sum(row.prediction.launches * us(row) for row in rows) / 1e3
            for us in (
                lambda row: row.prediction.bound_us,
                lambda row: row.prediction.sum_us,
                lambda row: 1e3 * row.timing.median_ms,
            )
        )
        words += (
            f" These kernels in a step: bound {bound:.2f} ms, sum {total:.2f} ms, measured {measured:.2f} ms: "
            f"{measured / bound:.2f} of the bound, {measured / total:.2f} of the sum."
        )
    return words


def calibration_section(result: CalibrationResult) -> Section:
    """The kernels, those that take most of a step first."""
    blocks: list[Block] = [Text(calibration_words(result)), calibration_table(result)]
    blocks += [Text(f"no time for {name}", warning=True) for name in result.left_out]
    return Section(
        f"Predicted against measured, {result.settings.model}, {result.environment.device_name}", tuple(blocks)
    )


def _ratio(row: RaceContestant) -> Ratio | None:
    return None if row.config == "launched" else row.ratio_to_launched


RACE: tuple[Column[RaceContestant], ...] = (
    Column("configuration", lambda row: row.config, words=True),
    Column("predicted bound (µs)", lambda row: row.prediction.bound_us or None, US),
    Column("predicted sum (µs)", lambda row: row.prediction.sum_us or None, US),
    Column("limiter", lambda row: row.prediction.refused or row.prediction.limiter, words=True),
    Column("blocks/SM", lambda row: row.prediction.blocks),
    Column("spilled bytes", lambda row: row.prediction.spill_bytes),
)
RACE_MEASURED: tuple[Column[RaceContestant], ...] = (
    Column(
        "measured (µs)",
        lambda row: (row.failed and f"FAILED: {row.failed}") or (row.timing and 1e3 * row.timing.median_ms),
        US,
    ),
    Column("time / launched", _ratio, interval),
)


def race_section(case: RaceCase) -> Section:
    """The configurations of a kernel at a shape."""
    title = (
        f"{case.kernel}, {case.shape}: expected gain {case.expected_gain_us:,.0f} µs a step ({case.per_step} launches)"
    )
    measured = any(row.timing or row.failed for row in case.contestants)
    columns = RACE + RACE_MEASURED if measured else RACE
    return Section(title, (table(columns, case.contestants, bad=lambda row: row.failed is not None),))


def races_section(result: RaceResult) -> Section:
    """All races, the largest expected gain first."""
    words = (
        f"{result.dtype}, {result.tokens:,} tokens; predicted for {result.gpu}: bound if all resources overlap, sum if "
        "none do. launched: the configuration of today."
    )
    if any(row.timing for case in result.races for row in case.contestants):
        words += " time / launched below 1: faster than that."
    blocks: list[Block] = [Text(words), *(race_section(case) for case in result.races)]
    blocks += [Text(f"no time for {name}", warning=True) for name in result.left_out]
    return Section(f"Candidates, {result.environment.device_name}", tuple(blocks))
