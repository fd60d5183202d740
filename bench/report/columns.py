"""The columns of the tables of results, each defined once: title, the value it reads from a row, its format.

The terminal, Markdown and HTML show the same columns (see `render`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from ..measure.case import BOUND, Missing
from ..measure.result import (
    CompiledKernel,
    FuseCase,
    FuseContestant,
    KernelContestant,
    KernelTime,
    ParityRun,
    PassResult,
    ProfiledOperator,
    QualityPoint,
    QualityRecipe,
    QualityResult,
    QualityRun,
    Stage,
    StepContestant,
    TrainContestant,
)
from ..measure.statistics import Ratio
from .blocks import Cell, Row, Table

R = TypeVar("R")
AnyContestant = FuseContestant | KernelContestant | StepContestant | TrainContestant


@dataclasses.dataclass(frozen=True)
class Column(Generic[R]):
    """A column of a table.

    Attributes:
        read: a row's value. None leaves the cell empty; a string is shown as it is.
        format: the text of any other value: a function, or a format string.
        words: text, aligned left.
    """

    title: str
    read: Callable[[R], Any]
    format: str | Callable[[Any], str] = "{}"
    words: bool = False

    def cell(self, row: R) -> Cell:
        """The cell of ``row``."""
        value = self.read(row)
        if value is None or isinstance(value, str):
            return Cell(value or "")
        if isinstance(value, float) and math.isnan(value):
            return Cell("not finite")
        text = self.format.format(value) if isinstance(self.format, str) else self.format(value)
        return Cell(text, value.median if isinstance(value, Ratio) else float(value))


def table(
    columns: Sequence[Column[R]],
    rows: Iterable[R],
    *,
    bad: Callable[[R], bool] = lambda row: False,
    role: Callable[[R], str] = lambda row: getattr(row, "role", ""),
) -> Table:
    """The table of ``rows``.

    Args:
        bad: whether something in a row is not right.
        role: a row's role: "ours", "peer", "bound" or "".
    """
    return Table(
        header=tuple(column.title for column in columns),
        words=tuple(column.words for column in columns),
        rows=tuple(Row(tuple(column.cell(row) for column in columns), role(row), bad(row)) for row in rows),
    )


def contestants_table(columns: Sequence[Column[R]], rows: Sequence[R]) -> Table:
    """The table of contestants, where one that is coarse, wrong or failed is bad."""
    return table(columns, rows, bad=lambda row: row.verdict.is_bad)  # type: ignore[attr-defined]


# Formats


def milliseconds(ms: float) -> str:
    """A time, in µs below 0.1 ms."""
    return f"{ms:.3f} ms" if ms >= 0.1 else f"{1e3 * ms:.1f} µs"


def size(n: float) -> str:
    """Bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def interval(ratio: Ratio) -> str:
    """A ratio and its 95 % interval."""
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def percent(digits: int = 0) -> Callable[[float], str]:
    """A share, in per cent."""
    return lambda share: f"{100 * share:.{digits}f} %"


def status(row: AnyContestant) -> str:
    """A contestant's verdict, in capitals where it is not right."""
    return row.verdict.status.upper() if row.verdict.is_bad else row.verdict.status


# Contestants


def _of_time(title: str, read: Callable[[Any], Any], format: str | Callable[[Any], str]) -> Column[Any]:
    """A column of a contestant's ``time``; empty where the contestant was not timed."""
    return Column(title, lambda row: row.time and read(row.time), format)


CONTESTANT: Column[Any] = Column("contestant", lambda row: row.name, words=True)
VERDICT: Column[Any] = Column("verdict", status, words=True)
ERROR: Column[Any] = Column("error", lambda row: row.verdict.largest_error, "{:.1e}")
VERSUS_TORCH: Column[Any] = Column(
    "× torch", lambda row: None if math.isnan(row.verdict.versus_torch) else row.verdict.versus_torch, "{:.2f}"
)
MEDIAN = _of_time("median", lambda time: time.timing.median_ms, milliseconds)
SPREAD = _of_time("spread", lambda time: time.timing.spread, percent(1))
RATIO = _of_time("time / ours [95 %]", lambda time: time.ratio_to_ours, interval)
TOKENS_PER_S = _of_time("tokens/s", lambda time: time.tokens_per_s, "{:,.0f}")
PEAK_MEMORY = _of_time("peak memory", lambda time: time.peak_bytes, size)


def kernel_columns(measured: PassResult) -> list[Column[Any]]:
    """Of one pass of one case. Its limit chooses the unit of the rate. A bound does not do the whole work: no rate."""

    def of_time(title: str, read: Callable[[KernelTime], float], format: str | Callable[[Any], str]) -> Column[Any]:
        return Column(title, lambda row: None if row.role == BOUND or not row.time else read(row.time), format)

    if measured.floor.limit == "matmul":
        rate = of_time("rate", lambda time: time.flops_per_s / 1e12, "{:.4g} TFLOP/s")
    else:
        rate = of_time("rate", lambda time: time.bytes_per_s / 1e9, "{:.4g} GB/s")
    roofline = of_time("roofline", lambda time: time.roofline, percent())
    return [CONTESTANT, VERDICT, ERROR, VERSUS_TORCH, MEDIAN, SPREAD, RATIO, rate, roofline, PEAK_MEMORY]


THREADS = _of_time("threads", lambda time: time.threads, "{}")
STEP = (
    CONTESTANT,
    VERDICT,
    ERROR,
    VERSUS_TORCH,
    TOKENS_PER_S,
    dataclasses.replace(MEDIAN, title="step"),
    SPREAD,
    RATIO,
    _of_time("MFU", lambda time: time.mfu, percent(1)),
    PEAK_MEMORY,
)


TEXTS = (CONTESTANT, VERDICT, ERROR, TOKENS_PER_S, MEDIAN, SPREAD, RATIO)


def train_columns(step: int) -> list[Column[Any]]:
    """Of a training run; losses are compared at ``step``."""
    return [
        CONTESTANT,
        VERDICT,
        TOKENS_PER_S,
        RATIO,
        _of_time("steps", lambda time: time.steps, "{:,}"),
        _of_time("tokens", lambda time: time.tokens, "{:,}"),
        _of_time(f"loss by step {step:,}", lambda time: time.loss_at_same_step.loss, "{:.4f}"),
        _of_time("held-out loss", lambda time: time.heldout_loss, "{:.4f}"),
        PEAK_MEMORY,
    ]


def parity_columns(steps: int) -> list[Column[tuple[str, ParityRun]]]:
    """Of runs of ``steps`` steps: the loss at the first, the last and some steps between."""
    shown = sorted({*range(0, steps, max(1, steps // 5)), steps - 1})
    return [
        Column("run", lambda run: run[0], words=True),
        *(Column(f"loss at step {i + 1:,}", lambda run, i=i: run[1].losses[i], "{:.4f}") for i in shown),  # type: ignore[misc]
        Column("tokens/s", lambda run: run[1].tokens_per_s, "{:,.0f}"),
    ]


def finetune_parity_columns(seeds: int) -> list[Column[tuple[str, list[float]]]]:
    """Of the accuracies of runs with ``seeds`` seeds."""
    return [
        Column("run", lambda run: run[0], words=True),
        Column("mean", lambda run: statistics.mean(run[1]), "{:.1%}"),
        Column("standard deviation", lambda run: statistics.stdev(run[1]), "{:.1%}"),
        *(Column(f"seed {i}", lambda run, i=i: run[1][i], "{:.1%}") for i in range(seeds)),  # type: ignore[misc]
    ]


def fuse_columns(cases: Sequence[FuseCase]) -> list[Column[FuseCase]]:
    """Of a fused model, a row a case: each peer's time over ours."""

    def value(column: Column[Any], title: str, name: str) -> Column[FuseCase]:
        def read(case: FuseCase) -> Any:
            row = next((x for x in case.contestants if x.name == name), None)
            return None if row is None else column.read(row) if row.time else status(row)

        return dataclasses.replace(column, title=title, read=read)

    ours, *peers = dict.fromkeys(x.name for case in cases for x in case.contestants)
    return [
        Column("batch", lambda case: case.words, words=True),
        Column("pass", lambda case: case.pass_name, words=True),
        *(value(RATIO, f"{name} / ours [95 %]", name) for name in peers),
        Column("products alone", lambda case: case.products, lambda found: f"{found.median:.2f}"),
        value(TOKENS_PER_S, f"{ours}, real tokens/s", ours),
    ]


def quality_columns(result: QualityResult) -> list[Column[QualityRecipe]]:
    """Of recipes: what they cost and reach, as means over the seeds with the least and the most."""

    def spread(values: Sequence[float], form: str) -> str | None:
        if not values:
            return None
        mean = math.fsum(values) / len(values)
        return f"{form.format(mean)} [{form.format(min(values))}, {form.format(max(values))}]"

    def over_seeds(read: Callable[[QualityRun], float | None], form: str) -> Callable[[QualityRecipe], Any]:
        return lambda recipe: spread([value for value in map(read, recipe.runs) if value is not None], form)

    def against(read: Callable[[QualityPoint], float | None], form: str) -> Callable[[QualityRecipe], Any]:
        return lambda recipe: None if recipe is first else spread(result.at_equal_time(recipe, read), form)

    def cost(which: int) -> Callable[[QualityRecipe], Any]:
        def cell(recipe: QualityRecipe) -> str:
            found = result.cost(recipe, which)
            return "not reached" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)

        return cell

    first = result.recipes[0]
    finetuned = any(run.finetuned_accuracy is not None for recipe in result.recipes for run in recipe.runs)
    accuracy = Column("fine-tuned accuracy", over_seeds(lambda run: run.finetuned_accuracy, "{:.3f}"))
    return [
        Column("recipe", lambda x: x.name, words=True),
        Column("steps", lambda x: x.runs[0].last.step, "{:,}"),
        Column("tokens", lambda x: x.runs[0].last.tokens, "{:,}"),
        Column("seconds", over_seeds(lambda run: run.last.seconds, "{:.0f}")),
        Column("held-out loss", over_seeds(lambda run: run.last.mlm_loss, "{:.3f}")),
        Column("NSP accuracy", over_seeds(lambda run: run.last.nsp_accuracy, "{:.2f}")),
        *([accuracy] if finetuned else []),
        Column("tokens to target", cost(0)),
        Column("time to target", cost(1)),
        Column("equal time: loss", against(lambda point: point.mlm_loss, "{:+.3f}")),
        Column("equal time: NSP", against(lambda point: point.nsp_accuracy, "{:+.2f}")),
    ]


# Summaries


def _ours_ms(measured: PassResult) -> float | str:
    ours = measured.ours
    return ours.time.timing.median_ms if ours and ours.time else "NOT TIMED"


SUMMARY: tuple[Column[PassResult], ...] = (
    Column("", lambda m: f"{m.op} {m.case}, {m.pass_name}", words=True),
    Column("fastest peer / ours [95 %]", lambda m: m.fastest_peer and RATIO.read(m.fastest_peer), interval),
    Column("fastest peer", lambda m: m.fastest_peer.name if m.fastest_peer else "none", words=True),
    Column("fusebert", _ours_ms, milliseconds),
    Column("of roofline", lambda m: m.ours.time.roofline if m.ours and m.ours.time else None, percent()),
)


@dataclasses.dataclass(frozen=True)
class NotRight:
    """A contestant that is not right in a case."""

    measured: PassResult
    contestant: KernelContestant

    @property
    def role(self) -> str:
        return self.contestant.role


def _of_contestant(column: Column[Any]) -> Column[NotRight]:
    return dataclasses.replace(column, read=lambda x: column.read(x.contestant))


NOT_RIGHT: tuple[Column[NotRight], ...] = (
    Column("operator", lambda x: x.measured.op, words=True),
    Column("case", lambda x: x.measured.case, words=True),
    _of_contestant(CONTESTANT),
    _of_contestant(VERDICT),
    Column("why", lambda x: x.contestant.verdict.detail, words=True),
    _of_contestant(ERROR),
    _of_contestant(VERSUS_TORCH),
)


@dataclasses.dataclass(frozen=True)
class Gap:
    """A peer that is missing from cases of an operator. ``where``: those cases, in words."""

    missing: Missing
    op: str
    where: str


GAP: tuple[Column[Gap], ...] = (
    Column("peer", lambda gap: gap.missing.name, words=True),
    Column("operator", lambda gap: gap.op, words=True),
    Column("why it is missing", lambda gap: gap.missing.reason, words=True),
    Column("where", lambda gap: gap.where, words=True),
)

PROFILE: tuple[Column[ProfiledOperator], ...] = (
    Column("operator", lambda x: x.name, words=True),
    Column("calls", lambda x: x.calls, "{:.0f}"),
    Column("time", lambda x: x.ms, "{:.3f} ms"),
    Column("share", lambda x: x.share, percent(1)),
    Column("GFLOP", lambda x: x.floor.flops / 1e9 or None, "{:.3g}"),
    Column("MB", lambda x: x.floor.bytes / 1e6, "{:.3g}"),
    Column("limit", lambda x: x.floor.limit, words=True),
    Column("roofline", lambda x: x.roofline, percent()),
)

LOST: tuple[Column[ProfiledOperator], ...] = (
    Column("operator", lambda x: x.name, words=True),
    Column("lost", lambda x: x.lost_ms, "{:.3f} ms"),
    Column("roofline", lambda x: x.roofline, percent()),
)

# What is not timed

COMPILED: tuple[Column[CompiledKernel], ...] = (
    Column("case", lambda x: x.case, words=True),
    Column("kernel", lambda x: x.kernel, words=True),
    Column("warps", lambda x: x.warps),
    Column("stages", lambda x: x.stages),
    Column("registers", lambda x: x.registers),
    Column("spills (B)", lambda x: x.spill_bytes, "{:,}"),
    Column("shared (B)", lambda x: x.shared_bytes, "{:,}"),
    Column("blocks/SM", lambda x: x.blocks_per_multiprocessor),
    Column("matrix", lambda x: x.matrix),
    Column("128-bit loads", lambda x: x.loads_128),
    Column("128-bit stores", lambda x: x.stores_128),
)


def _outcome(stage: Stage) -> str:
    if stage.exit_status == 0:
        return "passed"
    return "OUT OF TIME" if stage.exit_status in (124, 137) else f"FAILED ({stage.exit_status})"


STAGE: tuple[Column[Stage], ...] = (
    Column("stage", lambda x: x.stage, words=True),
    Column("result", _outcome, words=True),
    Column("time", lambda x: x.seconds, "{} s"),
)


def string_columns(*titles: str, words: int) -> list[Column[Sequence[str]]]:
    """Columns of rows that are sequences of strings; the first ``words`` of them are aligned left."""
    return [Column(title, lambda row, i=i: row[i], words=i < words) for i, title in enumerate(titles)]  # type: ignore[misc]
