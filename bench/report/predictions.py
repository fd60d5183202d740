"""Tables of `PredictResult`: every figure in them is predicted from compiled code, and called so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..measure.gpus import LAUNCH_SECONDS, short_name
from ..measure.prediction import KernelPrediction, OtherCall, PassPrediction, StepPrediction
from ..measure.result import OperatorPredictResult, PredictAbout, PredictResult
from .blocks import Block, Section, Table, Text
from .columns import Column, percent, table

US = "{:,.1f}"
MOST_OTHERS = 20  # rows of the table of PyTorch's operators


def _share(of: str) -> Column[KernelPrediction]:
    """The share of the roofline that the bound or the sum allows."""

    def read(row: KernelPrediction) -> float | None:
        us: float = getattr(row, f"{of}_us")
        return row.roofline_us / us if us else None

    return Column(f"roofline at the {of}", read, percent())


def _resource(name: str) -> Column[KernelPrediction]:
    return Column(name, lambda row: row.us.get(name), US)


KERNELS: tuple[Column[KernelPrediction], ...] = (
    Column("operator", lambda row: row.call, words=True),
    Column("kernel", lambda row: row.kernel, words=True),
    Column("launches", lambda row: row.launches),
    Column("programs", lambda row: row.programs, "{:,}"),
    Column("warps", lambda row: row.warps),
    Column("blocks/SM", lambda row: row.blocks),
    Column("waves", lambda row: row.waves, "{:.1f}"),
    *(_resource(name) for name in ("issue", "alu", "fma", "special", "tensor", "shared", "l2", "hbm")),
    Column("bound (µs)", lambda row: row.bound_us or None, US),
    Column("sum (µs)", lambda row: row.sum_us or None, US),
    Column("limiter", lambda row: (row.refused and f"not predicted: {row.refused}") or row.limiter, words=True),
    _share("bound"),
    _share("sum"),
)

OTHERS: tuple[Column[OtherCall], ...] = (
    Column("operator of PyTorch", lambda row: row.name, words=True),
    Column("calls", lambda row: row.calls),
    Column("GFLOP", lambda row: row.flops / 1e9 or None, "{:,.1f}"),
    Column("MB", lambda row: row.bytes / 1e6, "{:,.1f}"),
    Column("µs in all", lambda row: row.us, US),
)


def _unless_refused(read: Callable[[PassPrediction], float]) -> Callable[[PassPrediction], float | None]:
    return lambda row: None if row.refused else read(row)


PASSES: tuple[Column[PassPrediction], ...] = (
    Column("shape", lambda row: row.case, words=True),
    Column("pass", lambda row: row.which, words=True),
    Column("launches", lambda row: row.launches),
    Column("floor (µs)", lambda row: row.floor_us, US),
    Column("floor by", lambda row: row.floor_limit, words=True),
    Column("PyTorch's (µs)", lambda row: row.others_us or None, US),
    Column("bound (µs)", _unless_refused(lambda row: row.bound_us), US),
    Column("sum (µs)", _unless_refused(lambda row: row.sum_us), US),
    Column("limiter", lambda row: "not predicted" if row.refused else row.limiter, words=True),
    Column("floor / bound", _unless_refused(lambda row: row.floor_us / row.bound_us), percent()),
    Column("floor / sum", _unless_refused(lambda row: row.floor_us / row.sum_us), percent()),
)


def step_terms(step: StepPrediction) -> Table:
    """The sums of a step, in milliseconds."""
    terms = [
        ("matrix products at the rate of a large one", step.products_us),
        ("PyTorch's other operators at the copy rate", step.others_us),
        ("our kernels, if each overlaps all its resources", step.kernels_bound_us),
        ("our kernels, if none overlaps any", step.kernels_sum_us),
        (f"{step.launches} launches, {1e6 * LAUNCH_SECONDS:.0f} µs each", step.launches_us),
        ("step, all overlap", step.best_us),
        ("step, nothing overlaps", step.worst_us),
        ("floor of docs/step.md", step.floor_us),
    ]
    columns: tuple[Column[tuple[str, float]], ...] = (
        Column("predicted", lambda row: row[0], words=True),
        Column("ms", lambda row: row[1] / 1e3, "{:.3f}"),
        Column("ns a token", lambda row: 1e3 * row[1] / step.tokens, "{:.1f}"),
        Column(
            "tokens/s",
            lambda row: 1e6 * step.tokens / row[1] if row[0].startswith(("step", "floor")) else None,
            "{:,.0f}",
        ),
    )
    return table(columns, terms)


def _lengths(result: PredictResult) -> str:
    of = result.settings
    return f"ragged ≤ {of.seqlen}" if of.ragged else f"equal, {of.seqlen}"


def _how(about: PredictAbout, what: str) -> Text:
    """How the figures were made, and what they mean."""
    return Text(
        f"Predicted from the code that Triton {about.triton} compiles, not measured. {what}; {about.gpu['name']} with "
        f"copies at {about.gpu['copy_bytes_per_s'] / 1e12:.3g} TB/s and products at "
        f"{about.gpu['matmul_flops_per_s'] / 1e12:,.0f} TFLOP/s. Microseconds of a launch by resource; bound: all "
        "overlap; sum: none do. Latency is not counted."
    )


def prediction_section(result: PredictResult) -> Section:
    """Kernels by the time that they take of the step, PyTorch's operators, and the step's sums."""
    of = result.settings
    rows = sorted(result.kernels, key=lambda row: -row.launches * row.sum_us)
    shape = f"{of.model}, {of.dtype}, lengths {_lengths(result)}, {of.tokens:,} token slots, dropout {of.dropout}"
    blocks: list[Block] = [
        _how(result.about, shape),
        table(KERNELS, rows, bad=lambda row: row.refused is not None),
        table(OTHERS, result.others[:MOST_OTHERS]),
    ]
    if result.step is None:
        blocks.append(Text("No sum for the step: a kernel is not predicted.", warning=True))
    else:
        blocks.append(step_terms(result.step))
    return Section(f"Predicted step, {of.model}, {result.about.gpu['name']}", tuple(blocks))


def operator_section(result: OperatorPredictResult) -> Section:
    """Each pass beside its floor, then its kernels, and PyTorch's operators within it."""
    others = sorted((row for each in result.passes for row in each.others), key=lambda row: -row.us)
    blocks: list[Block] = [
        _how(result.about, f"{result.settings.op}, {result.settings.dtype}"),
        table(PASSES, result.passes, bad=lambda row: row.refused),
        table(KERNELS, result.kernels, bad=lambda row: row.refused is not None),
    ]
    if others:
        blocks.append(table(OTHERS, others[:MOST_OTHERS]))
    return Section(f"Predicted {result.settings.op}, {result.about.gpu['name']}", tuple(blocks))


def _of_step(title: str, read: str) -> Column[PredictResult]:
    """A term of the step, in nanoseconds a token."""

    def value(result: PredictResult) -> float | None:
        return None if result.step is None else 1e3 * getattr(result.step, read) / result.step.tokens

    return Column(title, value, "{:.0f}")


def _tokens_per_s(title: str, first: str, second: str | None = None) -> Column[PredictResult]:
    def value(result: PredictResult) -> str:
        if result.step is None:
            return "not predicted"
        rates = [1e6 * result.step.tokens / getattr(result.step, name) for name in (first, second) if name]
        return " to ".join(f"{rate:,.0f}" for rate in rates)

    return Column(title, value)


SUMMARY: Sequence[Column[PredictResult]] = (
    Column("preset", lambda x: x.settings.model, words=True),
    Column("lengths", _lengths, words=True),
    Column("GPU", lambda x: short_name(x.about.gpu["name"]), words=True),
    _of_step("products", "products_us"),
    _of_step("other operators", "others_us"),
    _of_step("our kernels, all overlap", "kernels_bound_us"),
    _of_step("our kernels, nothing does", "kernels_sum_us"),
    _of_step("launches", "launches_us"),
    _tokens_per_s("floor, tokens/s", "floor_us"),
    _tokens_per_s("our code, predicted tokens/s", "worst_us", "best_us"),
)
