"""Documents from files: the kinds of file, streaming, and the error for each bad file."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from fusebert.train.errors import UserError
from fusebert.train.text import compression, readers
from fusebert.train.text.files import find_files
from fusebert.train.text.readers import DOCUMENT_CHARS, read_documents
from fusebert.train.text.reading import Reading
from fusebert.train.text.text_file import TextFile


def read(path, **options):
    return list(read_documents(TextFile(path, str(path)), Reading(**options)))


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def pack(path, data):
    """Writes ``data`` as the suffix says: two members end to end, which every format allows."""
    half = len(data) // 2
    packer = PACKED.get(path.suffix, bytes)
    path.write_bytes(packer(data[:half]) + packer(data[half:]))
    return path


DOCUMENTS = ["One line.", "Two\nlines, ünïcödé 漢字 🙂", "The last, without an end."]


@pytest.mark.parametrize("packed", PACKED)
def test_blank_lines_end_documents(tmp_path, packed):
    text = "\n\n  \n" + DOCUMENTS[0] + "\n \t\n" + DOCUMENTS[1] + "\n\n\n" + DOCUMENTS[2]
    for name, data in (("unix", text), ("dos", text.replace("\n", "\r\n")), ("marked", "\ufeff" + text)):
        assert read(pack(tmp_path / f"{name}.txt{packed}", data.encode())) == DOCUMENTS


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_json_object_a_line(tmp_path, packed, ascii_only):
    lines = [
        json.dumps({"id": 1, "body": d}, ensure_ascii=ascii_only) for d in [*DOCUMENTS[:2], "", " \n", DOCUMENTS[2]]
    ]
    path = pack(tmp_path / f"a.jsonl{packed}", "\n".join([lines[0], "", *lines[1:]]).encode())
    assert read(path, text_field="body") == DOCUMENTS


def test_blocks_do_not_show(tmp_path, monkeypatch):
    text = "".join(f"Line {i} é.\n" + "\n" * (i % 3 == 0) for i in range(200))
    whole = read(pack(tmp_path / "a.txt", text.encode()))
    for module in (readers, compression):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    for suffix in PACKED:
        assert read(pack(tmp_path / f"b.txt{suffix}", text.encode())) == whole
    assert len(whole) == 68


def test_memory_is_bounded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"A sentence of the text.\n\n" * 400_000)
    consumed = []
    documents = read_documents(TextFile(path, "a"), progress=consumed.append)
    assert next(documents) == "A sentence of the text."
    assert sum(consumed) <= 1 << 20
    assert sum(1 for _ in documents) == 399_999
    assert sum(consumed) == path.stat().st_size


@pytest.mark.parametrize("end", ["\n", " "])
def test_long_documents_are_cut(tmp_path, end):
    words = [f"word{i}" for i in range(300_000)]
    text = end.join(words)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        pieces = read(tmp_path / name)
        assert len(pieces) >= len(text) // DOCUMENT_CHARS
        assert max(map(len, pieces)) <= DOCUMENT_CHARS + 16
        assert " ".join(pieces).split() == words


def test_json_strings_that_text_cannot_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b\\u0000c"}\n')
    assert read(tmp_path / "a.jsonl") == ["a\ufffdb c"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\nab\0c", r"NUL byte at byte 7 \(line 2\)"),
        ("a.txt", b"fine\n\n\xe9t\xe9", r"byte 0xe9, not UTF-8, at byte 6 \(line 3\)"),
        ("a.txt", "text".encode("utf-16"), "byte 0xff, not UTF-8, at byte 0"),
        ("a.txt", b"x" * (2 << 20) + b"\n\xff", rf"byte {(2 << 20) + 1} \(line 2\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]', r"a\.jsonl:2: a JSON list"),
        (
            "a.jsonl",
            b'{"id": 3, "body": "a"}',
            r"a\.jsonl:1: no field 'text' \(its fields: 'id', 'body'\).*--text-field",
        ),
        ("a.jsonl", b'{"text": null}', "is a NoneType, not a string"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.txt.gz", gzip.compress(b"text " * 999)[:-9], "cut short"),
        ("a.txt.gz", b"text", "damaged or not .gz"),
        ("a.txt.gz", gzip.compress(b"text " * 999)[:20] + b"\x00" * 40, "damaged or not .gz|cut short"),
        ("a.txt.zst", zstandard.compress(bytes(range(32, 120)) * 99)[:-9], "cut short"),
        ("a.txt.zst", b"text, long enough for a header", "damaged or not .zst"),
        ("a.txt.bz2", bz2.compress(b"text " * 999)[:-9], "cut short"),
        ("a.txt.bz2", b"text, long enough for a header", "damaged or not .bz2"),
        ("a.txt.xz", lzma.compress(b"text " * 999)[:-9], "cut short"),
        ("a.txt.xz", b"text, long enough for a header", "damaged or not .xz"),
    ],
    # The data would go into the ids, and gzip's holds the time of day: two workers would collect different tests.
    ids=[
        "NUL",
        "not UTF-8",
        "UTF-16",
        "not UTF-8, second block",
        "JSON cut short",
        "JSON list",
        "no such field",
        "null text",
        "deep JSON",
        "gz cut short",
        "not gz",
        "gz damaged",
        "zst cut short",
        "not zst",
        "bz2 cut short",
        "not bz2",
        "xz cut short",
        "not xz",
    ],
)
def test_bad_files_are_told_where(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_endless_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 21)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"a" * (4 << 20))
    with pytest.raises(UserError, match="line 1 is over 2 MiB"):
        read(tmp_path / "a.jsonl")


def test_finding_files(tmp_path):
    for name in ("b/2.jsonl", "b/1.txt.zst", "b/deep/3.txt", "b/image.png", "a.txt.gz", "c.md", "b/wiki_00", "b/w.bz2"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for name in ("b/.hidden", "b/.git/HEAD"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def names(*inputs):
        return [str(f.path.relative_to(tmp_path)) for f in find_files([str(tmp_path / i) for i in inputs])]

    assert names("b") == ["b/1.txt.zst", "b/2.jsonl", "b/deep/3.txt", "b/w.bz2", "b/wiki_00"]
    assert names("a.txt.gz", "b/**/*.txt", "b", "*.gz")[:3] == ["a.txt.gz", "b/deep/3.txt", "b/1.txt.zst"]
    assert names("c.md", "b/.git/HEAD") == ["c.md", "b/.git/HEAD"]
    assert find_files([]) == []
    (tmp_path / "[odd].txt").write_text("")
    assert names("[odd].txt") == ["[odd].txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.txt", "does not exist"),
        ("*.jsonl", "matches no file"),
        ("notes.pdf", "of an unknown kind"),
        ("*.pdf", "of an unknown kind"),
        ("empty", "holds no file of text"),
        ("em*", "no file of text"),
    ],
)
def test_inputs_that_name_nothing(tmp_path, given, message):
    (tmp_path / "notes.pdf").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty2").mkdir()
    with pytest.raises(UserError, match=message) as error:
        find_files([str(tmp_path / given)])
    assert given.removeprefix("*") in str(error.value)
    assert "\n" not in str(error.value)
