"""A report as Markdown: tables and text in full, plots as links to the PNG files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .blocks import Figure, Section, Table, Text


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def markdown_table(table: Table) -> list[str]:
    """The lines of a table; ours in bold, what is not right too: its verdict is in capitals."""
    marks = ["---" if i < table.left else "---:" for i in range(len(table.header))]
    lines = [f"| {' | '.join(map(_cell, table.header))} |", f"| {' | '.join(marks)} |"]
    for row in table.rows:
        cells = [_cell(cell.text) for cell in row.cells]
        if row.role == "ours" or row.bad:
            cells[0] = f"**{cells[0]}**"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _section(section: Section, level: int, images: Mapping[str, str]) -> Iterator[str]:
    yield f"{'#' * min(level, 6)} {section.title}"
    yield ""
    for block in section.blocks:
        if isinstance(block, Section):
            yield from _section(block, level + 1, images)
            continue
        if isinstance(block, Table):
            yield from markdown_table(block)
        elif isinstance(block, Figure):
            yield f"![{_cell(block.caption)}]({images[block.name]})"
        elif isinstance(block, Text):
            yield f"**{block.text}**" if block.tone == "warning" else block.text
        yield ""


def markdown(title: str, sections: Sequence[Section], images: Mapping[str, str]) -> str:
    """The whole report.

    Args:
        images: a figure's name → the path of its PNG, relative to the Markdown file.
    """
    lines = [f"# {title}", ""]
    for section in sections:
        lines += _section(section, 2, images)
    return "\n".join(lines).rstrip() + "\n"


__all__ = ["markdown", "markdown_table"]
