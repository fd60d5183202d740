"""A result file → its section of a report, by the kind of the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..measure.machine import Environment
from ..measure.serialise import from_json
from .blocks import Figure, Section, Text
from .cells import CPU_WARNING, Source
from .kernels import kernels_section
from .runs import parity_section, pretrain_section, step_section, train_section
from .untimed import aot_section, campaign_section

SECTIONS: dict[str, Callable[[Source, Sequence[Figure]], Section]] = {
    "kernels": kernels_section,
    "step": step_section,
    "train": train_section,
    "train_parity": parity_section,
    "pretrain": pretrain_section,
    "aot": aot_section,
    "campaign": campaign_section,
}


def section(source: Source, figures: Sequence[Figure]) -> Section:
    """The section of a result file, under what its file is called.

    Args:
        figures: those of its plots that there will be.

    Raises:
        KeyError, TypeError, IndexError: something is missing in the file.
    """
    found = SECTIONS[source.result["kind"]](source, figures)
    where = source.result.get("environment")
    lines = [Text(f"From {source.path.name}.")]
    if where:
        first, *others = from_json(Environment, where).describe().splitlines()
        lines = [Text(f"From {source.path.name}: {first}"), *map(Text, others)]
    return dataclasses.replace(found, blocks=(*lines, *found.blocks))


__all__ = [
    "CPU_WARNING",
    "SECTIONS",
    "Source",
    "section",
]
