"""Rows from each kind of file, with and without a header, and the line of a bad one."""

import io
from pathlib import Path

import pytest

from fusebert.train.errors import UserError
from fusebert.train.tasks.rows import Columns, Row, read_rows

LABELLED = Columns(labelled=True)


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def parts(path: Path, columns: Columns = LABELLED) -> list[tuple[object, ...]]:
    return [
        (row.text, row.label) if row.pair is None else (row.text, row.pair, row.label)
        for row in read_rows(path, columns)
    ]


@pytest.mark.parametrize(
    ("name", "columns"),
    [("texts.tsv", Columns("said")), *((f"texts.{kind}", Columns()) for kind in ("txt", "csv", "jsonl", "parquet"))],
)
def test_every_kind_gives_the_same_texts(place: Path, name: str, columns: Columns) -> None:
    texts = [row.text for row in read_rows(place / name, columns)]
    assert texts == (place / "texts.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.tsv", "text\tlabel\na b\tyes\n", LABELLED, [("a b", "yes")]),
        ("a.tsv", "label\tn\ttext\nyes\t1\ta b\n", LABELLED, [("a b", "yes")]),
        ("a.tsv", "a b\tyes\nc\tno\n", LABELLED, [("a b", "yes"), ("c", "no")]),
        ("a.tsv", 'say "hi\tyes\nc"\tno\n', LABELLED, [('say "hi', "yes"), ('c"', "no")]),
        ("a.tsv", "1\ta b\tyes\n", Columns("2", None, "3", True), [("a b", "yes")]),
        ("a.tsv", "q\ta\tsame\n", Columns("1", "2", "3", True), [("q", "a", "same")]),
        ("a.csv", 'text,label\n"a, b\nc",yes\n', LABELLED, [("a, b\nc", "yes")]),
        ("a.csv", "\ufefftext,label\r\na,1\r\n", LABELLED, [("a", "1")]),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"label": 0.5, "text": "b"}\n', LABELLED, [("a", 1), ("b", 0.5)]),
        ("a.jsonl", '{"q": "a", "r": "b", "label": "x"}\n', Columns("q", "r", None, True), [("a", "b", "x")]),
    ],
)
def test_columns(tmp_path: Path, name: str, content: str, columns: Columns, expected: list[object]) -> None:
    assert parts(write(tmp_path, name, content), columns) == expected


def test_a_column_whose_name_is_a_number(tmp_path: Path) -> None:
    assert parts(write(tmp_path, "a.csv", "1,2\nx,y\n"), Columns("2", None, "1", True)) == [("y", "x")]


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.tsv", "text\tlabel\na\tx\nb\n", LABELLED, "a.tsv:3: 1 cells, but the first row has 2"),
        ("a.csv", 'text,label\n"a\nb",x\nc,y,z\n', LABELLED, "a.csv:4: 3 cells"),
        ("a.csv", 'text,label\n"a" b,x\n', LABELLED, "a.csv:2: not a csv row"),
        ("a.tsv", "text\tlabel\na\t\n", LABELLED, "a.tsv:2: the label is empty"),
        (
            "a.tsv",
            "sentence\tlabel\na\tx\n",
            LABELLED,
            "a.tsv:1: no column 'text' (the first row: 'sentence', 'label'): name",
        ),
        ("a.tsv", "1\t2\t3\n", LABELLED, "a.tsv:1: no column 'text'"),
        ("a.tsv", "1\t2\t3\n", Columns("4"), "no column '4'"),
        ("a.tsv", "a\tb\n", Columns("body"), "no column 'body'"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "a"}\n', Columns(), "a.jsonl:2: no field 'text' (its fields: 'txt')"),
        ("a.jsonl", '{"text": 3}\n', Columns(), "a.jsonl:1: the text is a int, not a string"),
        ("a.jsonl", "[1]\n", Columns(), "a.jsonl:1: a JSON list"),
        ("a.jsonl", "{\n", Columns(), "a.jsonl:1: not JSON"),
        ("a.txt", "a\n", LABELLED, "no columns"),
        ("a.txt", "a\nb\0\n", Columns(), "a.txt:2: a NUL character"),
        ("a.pdf", "", Columns(), "its name must end in .txt, .tsv"),
        ("a.parquet", "no", Columns(), "a.parquet is damaged"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: str, columns: Columns, expected: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as raised:
        list(read_rows(path, columns))
    assert expected in str(raised.value)


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n\xff\xfe\tx\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_rows(tmp_path / "a.tsv", LABELLED))
    with pytest.raises(UserError, match="does not exist"):
        list(read_rows(tmp_path / "b.tsv", LABELLED))
    with pytest.raises(UserError, match="is not a file"):
        list(read_rows(tmp_path, LABELLED))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    assert list(read_rows("-", Columns())) == [
        Row("standard input:1", "one"),
        Row("standard input:2", ""),
        Row("standard input:3", "two"),
    ]
