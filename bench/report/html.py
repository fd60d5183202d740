"""A report as one HTML page: nothing is loaded from elsewhere, it reads on a phone, on light and on dark."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from .blocks import Figure, Row, Section, Table

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #24292f; --faint: #5c6670; --line: #dde1e6; --band: #f5f7f9;
  --ours: #0072b2; --ours-band: #e8f2f9; --bad: #b02a00; --bad-band: #fdeee9; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --ink: #d7dde4; --faint: #9aa5b1; --line: #333b45;
  --band: #1d242d; --ours: #56b4e9; --ours-band: #16293a; --bad: #ff8066; --bad-band: #3a1f1a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2rem) 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1.08rem; margin: 1.6rem 0 .4rem; }
h4, h5 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 60rem; } .warning { color: var(--bad); background: var(--bad-band);
  border-left: 4px solid var(--bad); padding: .4rem .7rem; font-weight: 600; }
nav ul { margin: .3rem 0; padding-left: 1.2rem; } a { color: var(--ours); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--band); vertical-align: bottom; } th[aria-sort] { cursor: pointer; user-select: none; }
th[aria-sort="ascending"]::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort="descending"]::after { content: " \\25BC"; font-size: .7em; }
.word { text-align: left; } td.word { white-space: normal; min-width: 7rem; max-width: 26rem; }
td:first-child { max-width: 45vw; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); } th:first-child {
  background: var(--band); }
tr.ours td { background: var(--ours-band); font-weight: 600; } tr.ours td:first-child { color: var(--ours);
  box-shadow: inset 4px 0 var(--ours); } tr.bound td { font-style: italic; color: var(--faint); }
tr.bad td { background: var(--bad-band); color: var(--bad); font-weight: 600; }
tr.bad td:first-child { color: var(--bad); box-shadow: inset 4px 0 var(--bad); }
figure { margin: 1rem 0; } figure img { display: block; width: 100%; max-width: 50rem; height: auto; }
figcaption { font-size: .9rem; color: var(--faint); margin-bottom: .3rem; }
details { margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .2rem .8rem; }
summary { cursor: pointer; font-weight: 600; padding: .35rem 0; }
@media print { details > * { display: block; } }
"""

# A click on a column's head sorts by it: figures first downwards, words upwards.
SCRIPT = """
for (const head of document.querySelectorAll("th[aria-sort]")) {
  const sort = () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "none"
      ? !head.classList.contains("word") : head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => { const cell = row.cells[column]; return cell.dataset.key ?? cell.textContent; };
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    body.append(...rows);
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
"""


class Image(NamedTuple):
    """A plot as PNG, for light and for dark paper."""

    light: bytes
    dark: bytes


def _row(row: Row, left: int) -> str:
    kinds = " ".join(kind for kind in (row.role if row.role != "peer" else "", "bad" if row.bad else "") if kind)
    cells = []
    for i, cell in enumerate(row.cells):
        word = ' class="word"' if i < left else ""
        key = "" if cell.key is None else f' data-key="{cell.key!r}"'
        cells.append(f"<td{word}{key}>{escape(cell.text)}</td>")
    attribute = f' class="{kinds}"' if kinds else ""
    return f"<tr{attribute}>{''.join(cells)}</tr>"


def _table(table: Table) -> Iterator[str]:
    yield '<div class="scroll" tabindex="0"><table>'
    if any(table.header):
        sortable = ' aria-sort="none"' if len(table.rows) > 1 else ""
        yield "<thead><tr>"
        for i, name in enumerate(table.header):
            word = ' class="word"' if i < table.left else ""
            yield f"<th{sortable}{word}>{escape(name)}</th>"
        yield "</tr></thead>"
    yield "<tbody>"
    yield from (_row(row, table.left) for row in table.rows)
    yield "</tbody></table></div>"


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _figure(figure: Figure, image: Image) -> Iterator[str]:
    caption = escape(figure.caption)
    yield f"<figure><figcaption>{caption}</figcaption><picture>"
    yield f'<source media="(prefers-color-scheme: dark)" srcset="{_source(image.dark)}">'
    yield f'<img alt="{caption}" src="{_source(image.light)}"></picture></figure>'


def _blocks(section: Section, level: int, images: Mapping[str, Image]) -> Iterator[str]:
    for block in section.blocks:
        if isinstance(block, Section):
            yield from _section(block, level, images)
        elif isinstance(block, Table):
            yield from _table(block)
        elif isinstance(block, Figure):
            yield from _figure(block, images[block.name])
        else:
            tone = f' class="{block.tone}"' if block.tone else ""
            yield f"<p{tone}>{escape(block.text)}</p>"


def _section(section: Section, level: int, images: Mapping[str, Image], anchor: str = "") -> Iterator[str]:
    if section.folded:
        yield f"<details><summary>{escape(section.title)}</summary>"
        yield from _blocks(section, level + 1, images)
        yield "</details>"
        return
    name, identity = f"h{min(level, 6)}", f' id="{anchor}"' if anchor else ""
    yield f"<{name}{identity}>{escape(section.title)}</{name}>"
    yield from _blocks(section, level + 1, images)


def _anchor(i: int, title: str) -> str:
    return f"{i}-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"


def page(title: str, sections: Sequence[Section], images: Mapping[str, Image]) -> str:
    """The whole page.

    Args:
        images: a figure's name → its plot.
    """
    anchors = [_anchor(i, section.title) for i, section in enumerate(sections)]
    links = "".join(
        f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<nav><ul>{links}</ul></nav>",
    ]
    for anchor, section in zip(anchors, sections, strict=True):
        lines += _section(section, 2, images, anchor)
    lines.append(f"<script>{SCRIPT}</script></body></html>")
    return "\n".join(lines) + "\n"


__all__ = ["Image", "page"]
