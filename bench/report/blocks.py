"""What a report is made of, whatever it is written as: sections of text, tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell; ``key`` is what a column sorts by where the text would sort wrongly."""

    text: str
    key: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """Attributes:
    cells: as many as the header has.
    role: "ours", "peer", "bound" or "" for none.
    bad: something in it is not right.
    """

    cells: tuple[Cell, ...]
    role: str = ""
    bad: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Attributes:
    left: so many columns from the left are words; the others are figures, set to the right.
    """

    header: tuple[str, ...]
    rows: tuple[Row, ...]
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph. ``tone``: "" or "warning"."""

    text: str
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Where the plot of this name goes, and what it shows in words."""

    name: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Attributes:
    folded: details, which a page shows on request.
    """

    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


Block = Text | Table | Figure | Section


def row(cells: Iterable[Cell | str], role: str = "", *, bad: bool = False) -> Row:
    """A `Row` from cells and plain words."""
    return Row(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells), role, bad)


def table(header: Sequence[str], rows: Iterable[Row], *, left: int = 1) -> Table:
    """A `Table`.

    Raises:
        ValueError: a row has not as many cells as the header.
    """
    found = Table(tuple(header), tuple(rows), left)
    for each in found.rows:
        if len(each.cells) != len(header):
            raise ValueError(f"a row needs {len(header)} cells; got {len(each.cells)}")
    return found


__all__ = ["Block", "Cell", "Figure", "Row", "Section", "Table", "Text", "row", "table"]
