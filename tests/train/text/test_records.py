"""Records: JSON arrays, tables, columns, nested fields, bad records, and JSON without a name that says so."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fusebert.train.errors import UserError
from fusebert.train.text import compression, readers, records
from fusebert.train.text.files import find_files
from fusebert.train.text.readers import read_documents
from fusebert.train.text.reading import Reading
from fusebert.train.text.text_file import TextFile

TEXTS = ["One, two.", 'Say "hi".\nÜnïcödé 漢字 🙂', "tab\tand 'quotes'", "The last [1] {2}."]


def read(path, given_format=None, **options):
    return list(read_documents(TextFile(path, str(path), given_format), Reading(**options)))


def as_csv(rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def write_arrow(path, table):
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


OBJECTS = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
CONTENT = {
    "array.json": json.dumps(OBJECTS),
    "pretty.json": json.dumps(OBJECTS, indent=2, ensure_ascii=False),
    "lines.json": "\n".join(map(json.dumps, OBJECTS)),
    "pretty_one_after_another.json": "\n".join(json.dumps(each, indent=2) for each in OBJECTS),
    "texts.json": json.dumps(TEXTS),
    "a.csv": as_csv([["id", "body"], *([i, text] for i, text in enumerate(TEXTS))]),
}


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("name", CONTENT)
def test_every_layout_gives_the_same_texts(tmp_path, monkeypatch, name, block):
    for module in (readers, compression):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
    (tmp_path / name).write_text(CONTENT[name], encoding="utf-8", newline="")
    assert read(tmp_path / name, text_field="body") == TEXTS


def test_tables_with_and_without_a_header(tmp_path):
    rows = ['1\tone "two" three\tx', "2\tfour\u2028five\ty"]
    (tmp_path / "a.tsv").write_text("\n".join(["id\ttext\tlabel", *rows]), encoding="utf-8")
    (tmp_path / "b.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    wanted = ['one "two" three', "four\u2028five"]
    assert read(tmp_path / "a.tsv") == wanted
    assert read(tmp_path / "b.tsv", text_field="2") == wanted
    with pytest.raises(UserError, match=r"b\.tsv:1: no column 'text' .*give its number"):
        read(tmp_path / "b.tsv")


def test_columns_of_data_sets(tmp_path):
    table = pyarrow.table({"id": range(600), "text": [f"Text {i}." for i in range(600)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    write_arrow(tmp_path / "b.arrow", table)
    with pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert read(tmp_path / name) == [f"Text {i}." for i in range(600)], name
        with pytest.raises(UserError, match=r"no column 'body' \(its columns: 'id', 'text'\)"):
            read(tmp_path / name, text_field="body")
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"bad{name}").write_bytes(data[: len(data) // 3])
        with pytest.raises(UserError, match=f"bad{name} is damaged or not a"):
            read(tmp_path / f"bad{name}")


def test_a_data_sets_folder_is_its_columns_alone(tmp_path):
    table = pyarrow.table({"text": ["One.", "Two."]})
    for name in ("train", "test"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_arrow(tmp_path / "set" / name / "data-00000-of-00001.arrow", table)
        (tmp_path / "set" / name / "dataset_info.json").write_text("{}")
        (tmp_path / "set" / name / "state.json").write_text("{}")
    (tmp_path / "set" / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.warns(UserWarning, match=r"is a data set: its 2 files .* 5 other files left out"):
        found = find_files([str(tmp_path / "set")])
    assert [text for file in found for text in read_documents(file)] == ["One.", "Two."] * 2


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_fields_of_fields(tmp_path, kind):
    values = [{"a": {"b": {"c": text}}, "id": 1} for text in TEXTS]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    else:
        path.write_text("\n".join(map(json.dumps, values)))
    assert read(path, text_field="a.b.c") == TEXTS
    for field, message in (("a.b", "'a.b' is a dict, not a string"), ("a.x.c", "no field 'x.c'")):
        with pytest.raises(UserError, match=message):
            read(path, text_field=field)


def test_a_field_with_a_dot_in_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a.b": "this", "a": {"b": "other"}}')
    assert read(tmp_path / "a.jsonl", text_field="a.b") == ["this"]


BAD = {
    "a.jsonl": '{"text": "fine"}\n{"text": \n{"body": "x"}\n{"text": null}\n["x"]\n{"text": "too"}',
    "a.json": '[{"text": "fine"}, {"body": "x"}, {"text": null}, ["x"], 17, {"text": "too"}]',
    "a.csv": 'text,n\nfine,1\nx\nx,y,z\n"a"b,2\nx,2,3\ntoo,4\n',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_skipped_when_told(tmp_path, name):
    path = tmp_path / name
    path.write_text(BAD[name])
    with pytest.raises(UserError, match=name):
        read(path)
    reading = Reading(skip_bad_records=True)
    assert list(read_documents(TextFile(path, name), reading)) == ["fine", "too"]
    assert reading.skipped == 4
    assert len(reading.reasons) == 3
    assert all(reason.startswith(name) for reason in reading.reasons)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "no comma or ] after record 1"),
        ('[{"text": "a"}', "cut short"),
        ('[{"text": "a"}] more', "more text after record 1"),
        ('{"text": "a"', "record 1: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"text": "a"}, {"text": "b' + "x" * 200, "record 2: not JSON"),
    ],
)
def test_what_is_no_json(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.json", skip_bad_records=True)
    assert "\n" not in str(error.value)


def test_an_endless_record_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_RECORD", 1 << 20)
    (tmp_path / "a.json").write_text('[{"text": "' + "a" * (4 << 20))
    with pytest.raises(UserError, match="over 1 Mi long"):
        read(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text('text\n"' + "a\n" * (2 << 20))
    with pytest.raises(UserError, match="not a csv row"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("name", CONTENT)
def test_json_is_known_without_a_name(tmp_path, name):
    (tmp_path / "data").write_text(CONTENT[name], encoding="utf-8", newline="")
    if name == "a.csv":
        assert read(tmp_path / "data", "csv", text_field="body") == TEXTS
    else:
        assert read(tmp_path / "data", text_field="body") == TEXTS


@pytest.mark.parametrize(
    "text", ["[1] A footnote.", "{{template}} of a wiki", "[ sic ] he said", "{ left open", "", "[citation needed] x"]
)
def test_prose_that_begins_with_a_bracket_is_prose(tmp_path, text):
    (tmp_path / "data").write_text(text)
    assert read(tmp_path / "data") == ([text] if text else [])


def test_broken_json_without_a_name_is_no_prose(tmp_path):
    (tmp_path / "data").write_text('{"text": "a" "b"}')
    with pytest.raises(UserError, match=r"not JSON .*--format txt reads it as text"):
        read(tmp_path / "data")
    assert read(tmp_path / "data", "txt") == ['{"text": "a" "b"}']


@pytest.mark.parametrize(
    ("name", "documents", "wanted"),
    [
        ("a.txt", None, ["a\nb", "c"]),
        ("a.txt", "line", ["a", "b", "c"]),
        ("a.txt", "file", ["a\nb\n\nc"]),
        ("a.md", None, ["a\nb\n\nc"]),
        ("a.md", "blank", ["a\nb", "c"]),
        ("noname", None, ["a\nb", "c"]),
    ],
)
def test_what_ends_a_document(tmp_path: Path, name: str, documents: str | None, wanted: list[str]) -> None:
    (tmp_path / name).write_text("\n\na\nb\n\n \nc\n\n".replace("\n \n", "\n"))
    assert read(tmp_path / name, documents=documents) == wanted
