"""What a report consists of, however it is written: sections of text, tables and figures."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Cell:
    """``key``: the number that a column sorts by; None sorts by the text."""

    text: str
    key: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """``role``: "ours", "peer", "bound" or "" for none. ``bad``: something in the row is not right."""

    cells: tuple[Cell, ...]
    role: str = ""
    bad: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """``words``: for each column, whether it is text (aligned left) or numbers (aligned right)."""

    kind: ClassVar[str] = "table"
    header: tuple[str, ...]
    words: tuple[bool, ...]
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """The place of a plot, by its name, and a sentence that says what it shows."""

    kind: ClassVar[str] = "figure"
    name: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """``folded``: details, which a page shows on request."""

    kind: ClassVar[str] = "section"
    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


Block = Text | Table | Figure | Section
