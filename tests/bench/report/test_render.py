"""Tables and sections as Markdown, as HTML and in the terminal."""

import io

import pytest
import rich.console

from fusebert.bench.report.blocks import Section, Text
from fusebert.bench.report.columns import Column, table
from fusebert.bench.report.render import markdown_table, page, terminal

COLUMNS = (Column("name", lambda row: row[0], words=True), Column("value", lambda row: row[1], "{:.1f} ms"))
TABLE = table(COLUMNS, [("x|y <b>\nz [red]", 1.26), ("empty", None), ("nan", float("nan"))], bad=lambda row: not row[1])


def test_cells_are_read_formatted_and_sorted_by_their_value():
    cells = [row.cells[1] for row in TABLE.rows]
    assert [(cell.text, cell.key) for cell in cells] == [("1.3 ms", 1.26), ("", None), ("not finite", None)]
    assert [row.bad for row in TABLE.rows] == [False, True, False]


def test_markdown_keeps_columns_whatever_the_cells_hold():
    assert markdown_table(TABLE) == [
        "| name | value |",
        "| --- | ---: |",
        "| x\\|y &lt;b> z [red] | 1.3 ms |",
        "| **empty** |  |",
        "| nan | not finite |",
    ]


def test_html_escapes_cells_and_folds_sections():
    text = page("t", [Section("top", (TABLE, Section("inner", (Text("deep"),), folded=True)))], {})
    assert '<td class="word">x|y &lt;b&gt;\nz [red]</td><td data-key="1.26">1.3 ms</td>' in text
    assert "<details><summary>inner</summary>\n<p>deep</p>\n</details>" in text


@pytest.mark.parametrize("width", [20, 200])
def test_terminal_keeps_lines_whole(width):
    console = rich.console.Console(file=io.StringIO(), width=width)
    terminal([Section("title", (TABLE, Text("one long line of text that is wider than the console")))], console=console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert "title" in lines
    assert lines[3].split() == ["x|y", "<b>", "1.3", "ms"]
    assert lines[4] == "z [red]"
    assert "one long line of text that is wider than the console" in lines
