"""The section of `bench kernels`: a summary, what is not right or missing, and every case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..measure.case import OURS, PEER
from ..measure.units import milliseconds, rate, size
from .blocks import Block, Cell, Figure, Row, Section, Table, Text, row, table
from .cells import (
    Source,
    device_words,
    error_cells,
    is_bad,
    memory_cell,
    remarks,
    timing_cells,
    verdict_cell,
    where_measured,
)


def _case_words(measured: dict[str, Any]) -> str:
    return f"{measured['op']} {measured['case']}, {measured['pass']}"


def fastest_peer(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The peer with the least time among those that were timed."""
    timed = [x for x in measured["contestants"] if x["role"] == PEER and "timing" in x]
    return min(timed, key=lambda x: x["timing"]["median_ms"], default=None)


def kernels_summary(result: dict[str, Any]) -> Table:
    """A row a pass: ours and the fastest peer that is right."""
    rows = []
    for measured in result["results"]:
        ours = next((x for x in measured["contestants"] if x["role"] == OURS), None)
        peer = fastest_peer(measured)
        cells = [Cell(_case_words(measured))]
        cells += [timing_cells(peer)[2], Cell(peer["name"])] if peer else [Cell(""), Cell("none")]
        if ours is None or "timing" not in ours:
            cells += [Cell("NOT TIMED"), Cell("")]
        else:
            cells += [timing_cells(ours)[0], Cell(f"{100 * ours['roofline']:.0f} %", ours["roofline"])]
        rows.append(row(cells, bad=ours is None or is_bad(ours)))
    return table(("", "fastest peer / ours [95 %]", "fastest peer", "fusebert", "of roofline"), rows)


def _not_right(result: dict[str, Any]) -> list[Table]:
    """Contestants that are coarse, wrong or failed, once each, and what is wrong with them."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for measured in result["results"]:
        for each in measured["contestants"]:
            if is_bad(each):
                what = (measured["op"], measured["case"], each["name"], each["verdict"]["status"])
                cells = [*map(Cell, what[:3]), verdict_cell(each), Cell(each["verdict"]["detail"]), *error_cells(each)]
                found[what] = row(cells, each["role"], bad=True)
    header = ("operator", "case", "contestant", "verdict", "why", "error", "× torch")
    return [table(header, found.values(), left=5)] if found else []


def _missing(result: dict[str, Any]) -> list[Table]:
    """Peers that did not run: why, and where."""
    cases: dict[str, list[str]] = {}  # operator → its cases
    gaps: dict[tuple[str, str, str], list[str]] = {}  # peer, why, operator → cases
    for measured in result["results"]:
        op, case = measured["op"], measured["case"]
        if case not in cases.setdefault(op, []):
            cases[op].append(case)
            for gap in measured["missing"]:
                gaps.setdefault((gap["name"], gap["reason"], op), []).append(case)
    rows = []
    for (name, reason, op), where in gaps.items():
        rows.append(row((name, op, reason, "every case" if where == cases[op] else "; ".join(where))))
    return [table(("peer", "operator", "why it is not there", "where"), rows, left=4)] if rows else []


def _case_blocks(measured: dict[str, Any]) -> Iterator[Text | Table]:
    shape = ", ".join(f"{name} {value}" for name, value in measured["shape"].items())
    yield Text(
        f"{shape}. At least {milliseconds(measured['floor_ms'])} ({measured['limit']}-bound: "
        f"{measured['flops']:.3g} FLOPs, {size(measured['bytes'])})."
    )
    rows = []
    for each in measured["contestants"]:
        cells = [Cell(each["name"]), verdict_cell(each), *error_cells(each)]
        if "timing" not in each:
            cells += [Cell("not timed"), *[Cell("")] * 5]
        else:
            bound, limit = each["role"] == "bound", measured["limit"]
            per_s = each["flops_per_s" if limit == "matmul" else "bytes_per_s"]
            cells += timing_cells(each)
            cells += (
                [Cell("")] * 2
                if bound
                else [
                    Cell(rate(limit, each), per_s),
                    Cell(f"{100 * each['roofline']:.0f} %", each["roofline"]),
                ]
            )
            cells.append(memory_cell(each))
        rows.append(row(cells, each["role"], bad=is_bad(each)))
    header = ("contestant", "verdict", "error", "× torch", "median", "spread", "time / ours [95 %]", "rate", "roofline")
    yield table((*header, "peak memory"), rows, left=2)
    yield from remarks(measured["contestants"])


def kernels_section(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    blocks: list[Block] = [*where_measured(result)]
    if "seconds" not in result:
        blocks.append(Text("This run was cut short: what it had measured until then follows.", "warning"))
    if result["left_out"]:
        blocks.append(Text(f"Left out for want of time: {'; '.join(result['left_out'])}."))
    if result.get("did_not_fit"):
        blocks.append(Text(f"Not measured, for want of memory: {'; '.join(result['did_not_fit'])}.", "warning"))
    blocks.append(kernels_summary(result))
    wrong, missing = _not_right(result), _missing(result)
    if wrong:
        blocks.append(Section("Not right", tuple(wrong)))
    if missing:
        blocks.append(Section("Peers that are missing", tuple(missing)))
    blocks += figures
    for op in dict.fromkeys(measured["op"] for measured in result["results"]):
        cases = [
            Section(f"{measured['case']}, {measured['pass']}", tuple(_case_blocks(measured)))
            for measured in result["results"]
            if measured["op"] == op
        ]
        blocks.append(Section(f"{op}: every case", tuple(cases), folded=True))
    return Section(f"Operators, {result['settings']['dtype']}, {device_words(result)}", tuple(blocks))


__all__ = [
    "fastest_peer",
    "kernels_section",
    "kernels_summary",
]
