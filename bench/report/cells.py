"""What the tables of a report share: a contestant's verdict, error, time and memory, and where it was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from ..measure.correctness import RIGHT, UNCHECKED
from ..measure.units import interval, milliseconds, size
from .blocks import Cell, Text
from .tables import ceiling_lines

CPU_WARNING = (
    "These figures time the CPU path, which runs PyTorch's own operators: they say nothing about the Triton kernels, "
    "nor about any GPU."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A result file: its name in the report, unique there, where it came from, and what is in it."""

    name: str
    path: PurePath
    result: dict[str, Any]


def verdict_cell(found: dict[str, Any]) -> Cell:
    status = found["verdict"]["status"]
    return Cell(status if status in (RIGHT, UNCHECKED) else status.upper())


def is_bad(found: dict[str, Any]) -> bool:
    return found["verdict"]["status"] not in (RIGHT, UNCHECKED)


def error_cells(found: dict[str, Any]) -> list[Cell]:
    """Largest error, and the largest ratio to PyTorch's."""
    errors = [x for x in found["verdict"]["errors"].values() if x is not None]
    versus = found["verdict"]["error_versus_torch"]
    error = Cell(f"{max(errors):.1e}", max(errors)) if errors else Cell("")
    return [error, Cell("") if versus is None else Cell(f"{versus:.2f}", versus)]


def timing_cells(found: dict[str, Any]) -> list[Cell]:
    """Median, spread, ratio."""
    timing, against = found["timing"], found["ratio_to_ours"]
    return [
        Cell(milliseconds(timing["median_ms"]), timing["median_ms"]),
        Cell(f"{100 * timing['spread']:.1f} %", timing["spread"]),
        Cell(interval(against), against and against["median"]),
    ]


def memory_cell(found: dict[str, Any]) -> Cell:
    peak = found.get("peak_bytes")
    return Cell("") if peak is None else Cell(size(peak), peak)


def remarks(rows: Sequence[dict[str, Any]]) -> Iterator[Text]:
    for found in rows:
        if found["verdict"]["detail"]:
            tone = "warning" if is_bad(found) else ""
            yield Text(f"{found['name']}: {found['verdict']['status']}: {found['verdict']['detail']}", tone)
        if found.get("timing", {}).get("host_bound"):
            yield Text(f"{found['name']}: the host needs as long to issue the calls as the GPU to run them")
        if found.get("micro_batches", 1) > 1:
            yield Text(f"{found['name']}: in {found['micro_batches']} micro-batches: the whole does not fit")


def where_measured(result: dict[str, Any]) -> list[Text]:
    """The warning that a CPU was timed, and the measured ceilings."""
    found = [Text(CPU_WARNING, "warning")] if result["environment"]["device"] == "cpu" else []
    if "ceilings" in result:
        found += [Text(line.strip()) for line in ceiling_lines(result["ceilings"])]
    return found


def device_words(result: dict[str, Any]) -> str:
    where = result["environment"]
    return where["gpu"]["name"] if "gpu" in where else "CPU path"


__all__ = [
    "CPU_WARNING",
    "Source",
    "device_words",
    "error_cells",
    "is_bad",
    "memory_cell",
    "remarks",
    "timing_cells",
    "verdict_cell",
    "where_measured",
]
