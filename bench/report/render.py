"""A report as Markdown, as one HTML page, and in the terminal."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import rich.console
import rich.table
import rich.text

from .blocks import Block, Figure, Section, Table, Text


class Image(NamedTuple):
    """A plot as PNG, for light and for dark paper."""

    light: bytes
    dark: bytes


# Markdown


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def markdown_table(table: Table) -> list[str]:
    """The lines of a table; ours and what is not right begin in bold."""
    marks = ["---" if words else "---:" for words in table.words]
    lines = [f"| {' | '.join(map(_escape, table.header))} |", f"| {' | '.join(marks)} |"]
    for row in table.rows:
        cells = [_escape(cell.text) for cell in row.cells]
        if row.role == "ours" or row.bad:
            cells[0] = f"**{cells[0]}**"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _markdown_section(section: Section, level: int, images: Mapping[str, str]) -> Iterator[str]:
    yield f"{'#' * min(level, 6)} {section.title}"
    yield ""
    for block in section.blocks:
        if isinstance(block, Section):
            yield from _markdown_section(block, level + 1, images)
            continue
        if isinstance(block, Table):
            yield from markdown_table(block)
        elif isinstance(block, Figure):
            yield f"![{_escape(block.caption)}]({images[block.name]})"
        else:
            yield f"**{block.text}**" if block.warning else block.text
        yield ""


def markdown(title: str, sections: Sequence[Section], images: Mapping[str, str]) -> str:
    """The whole report.

    Args:
        images: a figure's name → the path of its PNG, relative to the Markdown file.
    """
    lines = [f"# {title}", ""]
    for section in sections:
        lines += _markdown_section(section, 2, images)
    return "\n".join(lines).rstrip() + "\n"


# HTML


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def page(title: str, sections: Sequence[Section], images: Mapping[str, Image]) -> str:
    """The whole report on one page that loads nothing from elsewhere (template.html).

    Args:
        images: a figure's name → its plot.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((Path(__file__).parent / "template.html").read_text(encoding="utf-8"))
    anchors = [f"{i}-{re.sub(r'[^a-z0-9]+', '-', each.title.lower()).strip('-')}" for i, each in enumerate(sections)]
    sources = {name: Image(*map(_data_url, image)) for name, image in images.items()}  # type: ignore[arg-type]
    return template.render(title=title, sections=list(zip(anchors, sections, strict=True)), images=sources)


# Terminal


def terminal(blocks: Sequence[Block], *, console: rich.console.Console | None = None) -> None:
    """Print ``blocks``. Tables keep their width: in a narrower terminal their lines run on."""
    console = console or rich.console.Console(highlight=False)
    for block in blocks:
        if isinstance(block, Section):
            console.print()
            console.print(rich.text.Text(block.title, style="bold"), soft_wrap=True)
            terminal(block.blocks, console=console)
        elif isinstance(block, Table):
            _print_table(block, console)
        elif isinstance(block, Text):
            style = "bold red" if block.warning else ""
            console.print(rich.text.Text(block.text, style=style), soft_wrap=True)


def _print_table(table: Table, console: rich.console.Console) -> None:
    drawn = rich.table.Table(box=None, show_header=any(table.header), header_style="bold", pad_edge=False)
    for title, words in zip(table.header, table.words, strict=True):
        drawn.add_column(rich.text.Text(title), justify="left" if words else "right", no_wrap=True)
    for row in table.rows:
        style = "bold red" if row.bad else "bold" if row.role == "ours" else ""
        drawn.add_row(*(rich.text.Text(cell.text) for cell in row.cells), style=style)
    width = console.measure(drawn, options=console.options.update(max_width=10000)).maximum
    narrow, console.width = console.width, max(console.width, width)
    console.print(drawn, crop=False, overflow="ignore")
    console.width = narrow
