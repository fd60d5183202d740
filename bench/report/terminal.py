"""What the benchmarks print while they run: `show` takes each record as it is made."""

from __future__ import annotations

import functools
from typing import Any

from ..measure.case import Missing
from ..measure.ceilings import Ceilings
from ..measure.machine import Environment
from ..measure.result import KernelsResult, ParityResult, PassResult, StepResult, TrainResult, result_json
from ..measure.serialise import to_json
from . import tables


@functools.singledispatch
def show(record: Any) -> None:
    """Print a record of a benchmark; text as it is."""
    print(record, flush=True)


def _print(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


@show.register
def _(record: Environment) -> None:
    print(record.describe(), flush=True)


@show.register
def _(record: Ceilings) -> None:
    _print(tables.ceiling_lines(to_json(record)))


@show.register
def _(record: PassResult) -> None:
    _print(tables.case_lines(to_json(record)))


@show.register
def _(record: Missing) -> None:
    _print(tables.missing_lines([record]))


@show.register
def _(record: KernelsResult) -> None:
    _print(tables.summary_lines(to_json(record)["results"]))
    if record.clocks:
        print(record.clocks.describe())
    if record.ceilings_drift:
        print(tables.drift_line(to_json(record.ceilings_drift)))
    if record.left_out:
        minutes = record.settings.minutes
        print(f"Left out for want of time ({minutes} minutes): {'; '.join(record.left_out)}", flush=True)


@show.register
def _(record: StepResult) -> None:
    _print(tables.step_lines(result_json(record)))
    if record.profile:
        _print(tables.profile_lines(to_json(record.profile)))


@show.register
def _(record: TrainResult) -> None:
    _print(tables.train_lines(result_json(record)))
    if record.clocks:
        print(record.clocks.describe())


@show.register
def _(record: ParityResult) -> None:
    _print(tables.parity_lines(result_json(record)))
