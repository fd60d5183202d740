"""The sections of what is not timed: the kernels as compiled, and how a campaign's stages ended."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block, Cell, Figure, Section, Text, row, table
from .cells import Source


def aot_section(source: Source, figures: Sequence[Figure]) -> Section:
    about, kernels = source.result["about"], source.result["kernels"]
    spilling = sum(found["spill_bytes"] > 0 for found in kernels)
    columns = ("warps", "stages", "registers", "spill_bytes", "shared_bytes", "blocks_per_multiprocessor")
    rows = []
    for found in kernels:
        figures_of = [Cell(f"{found[name]:,}", found[name]) for name in columns]
        cells = [Cell(found["case"]), Cell(found["kernel"]), *figures_of, Cell(found["matrix"] or "")]
        cells += [Cell(str(found[name]), found[name]) for name in ("loads_128", "stores_128")]
        rows.append(row(cells, bad=found["spill_bytes"] > 0))
    header = ("case", "kernel", "warps", "stages", "registers", "spills (B)", "shared (B)", "blocks/SM", "matrix")
    resources = table((*header, "128-bit loads", "128-bit stores"), rows, left=2)
    blocks: tuple[Block, ...] = (
        Text(
            f"Compiled for {about['arch']} with Triton {about['triton']}, PyTorch {about['torch']}, {about['date']}; "
            "bfloat16 where a case names nothing else. Nothing here was run or timed: these are the compiler's "
            f"figures. {spilling} of {len(kernels)} kernels spill registers."
        ),
        Section("every kernel", (resources,), folded=True),
        *figures,
    )
    return Section(f"Compiled kernels, {about['arch']}", blocks)


def campaign_section(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    rows = []
    for stage in result["stages"]:
        status = stage["exit_status"]
        words = "passed" if status == 0 else "OUT OF TIME" if status in (124, 137) else f"FAILED ({status})"
        seconds = Cell(f"{stage['seconds']} s", stage["seconds"])
        rows.append(row((stage["stage"], words, seconds), bad=status != 0))
    text = Text(f"{result['seconds']} s in all, commit {result['commit'] or 'unknown'}.")
    return Section("Campaign", (text, table(("stage", "result", "time"), rows, left=2), *figures))


__all__ = [
    "aot_section",
    "campaign_section",
]
