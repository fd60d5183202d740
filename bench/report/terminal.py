"""What the benchmarks print while they run: `show` takes each record as it is made."""

from __future__ import annotations

import functools
from typing import Any

from ..measure.case import Missing
from ..measure.ceilings import Ceilings
from ..measure.machine import Environment
from ..measure.prediction import KernelCalibration, RaceCase
from ..measure.result import (
    CalibrationResult,
    EmbedResult,
    FinetuneParityResult,
    FinetuneResult,
    FuseCase,
    FuseResult,
    KernelsResult,
    OperatorPredictResult,
    ParityResult,
    PassResult,
    PredictResult,
    QualityResult,
    RaceResult,
    StepResult,
    TrainResult,
)
from .blocks import Text
from .calibrations import CALIBRATION, race_section
from .columns import interval
from .render import terminal
from .sections import ceiling_texts, drift_text, kernels_gaps, kernels_summary, pass_section, section


@functools.singledispatch
def show(record: Any) -> None:
    """Print a record of a benchmark; a string as it is."""
    print(record, flush=True)


@show.register
def _(record: Environment) -> None:
    print(record.describe(), flush=True)


@show.register
def _(record: Ceilings) -> None:
    terminal(ceiling_texts(record))


@show.register
def _(record: PassResult) -> None:
    terminal([pass_section(record, f"{record.op} {record.case} {record.dtype}, {record.pass_name}")])


@show.register
def _(record: Missing) -> None:
    print(f"{record.name}: {record.reason}", flush=True)


@show.register
def _(record: KernelsResult) -> None:
    texts = [] if record.clocks is None else [Text(record.clocks.describe())]
    texts += [] if record.ceilings_drift is None else [drift_text(record.ceilings_drift)]
    terminal([Text(""), kernels_summary(record.results), *texts, *kernels_gaps(record)])


@show.register
def _(record: FuseCase) -> None:
    ours, *peers = record.contestants
    if ours.time is None:
        print(f"{record.words}, {record.pass_name}: {ours.verdict.status}: {ours.verdict.detail}", flush=True)
        return
    ratios = ", ".join(
        f"{x.name} / ours {interval(x.time.ratio_to_ours)}" for x in peers if x.time and x.time.ratio_to_ours
    )
    print(f"{record.words}, {record.pass_name}: {ours.time.tokens_per_s:,.0f} tokens/s, {ratios}", flush=True)


@show.register
def _(record: KernelCalibration) -> None:
    print(
        "; ".join(f"{column.title} {text}" for column in CALIBRATION if (text := column.cell(record).text)), flush=True
    )


@show.register
def _(record: RaceCase) -> None:
    terminal([race_section(record)])


@show.register(CalibrationResult)
@show.register(EmbedResult)
@show.register(FinetuneParityResult)
@show.register(FinetuneResult)
@show.register(FuseResult)
@show.register(QualityResult)
@show.register(StepResult)
@show.register(TrainResult)
@show.register(ParityResult)
@show.register(OperatorPredictResult)
@show.register(PredictResult)
@show.register(RaceResult)
def _(record: Any) -> None:
    clocks = getattr(record, "clocks", None)
    terminal([section(record), *([Text(clocks.describe())] if clocks else [])])
