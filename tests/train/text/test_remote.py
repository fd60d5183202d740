"""Text behind URLs: the corpus is that of the same files on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pytest
from small_corpus import write_text

from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.errors import UserError
from fusebert.train.text import remote
from fusebert.train.text.files import find_files
from fusebert.train.text.readers import read_documents


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True)


def arrays(corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.directory.iterdir() if path.name != "manifest.json"}


def make(out: Path, *inputs: object, **options: object):
    options = {"vocab_size": 240, "heldout": 0.1, "workers": 1} | options
    return prepare(PrepareSettings(out, [str(each) for each in inputs], **options))


def test_the_corpus_is_that_of_local_files(tmp_path, store):
    local = tmp_path / "text"
    local.mkdir()
    write_text(local / "a.txt", 100, seed=1)
    texts = write_text(tmp_path / "b.txt", 100, seed=2).read_text().split("\n\n")
    (local / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts).encode()))
    write_text(local / "held.txt", 20, seed=3)
    for path in local.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    store.pipe("/bucket/picture.png", b"\x89PNG")
    options = {"heldout_files": [str(local / "held.txt")], "weight": [f"{local}/a*=2"]}
    ours = make(tmp_path / "local", local, **options)
    options = {"heldout_files": ["memory://bucket/held.txt"], "weight": ["memory://bucket/a*=2"]}
    theirs = make(tmp_path / "remote", "memory://bucket", **options)
    assert arrays(theirs) == arrays(ours)
    by_glob = make(tmp_path / "glob", "memory://bucket/*.txt", f"file://{local}/*.gz", **options)
    assert arrays(by_glob) == arrays(ours)


def test_columns(tmp_path, store):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one fox", "two owls"]})
    with store.open("/data/a.parquet", "wb") as file:
        parquet.write_table(table, file)
    with store.open("/data/b.arrow", "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    store.pipe("/data/README.md", b"# no document")
    files = find_files(["memory://data"])
    assert [file.name for file in files] == ["memory:///data/a.parquet", "memory:///data/b.arrow"]
    assert [list(read_documents(file)) for file in files] == [["one fox", "two owls"]] * 2


def test_a_change_between_the_passes_is_an_error(tmp_path, store, monkeypatch):
    text = write_text(tmp_path / "a.txt", 50).read_bytes()
    store.pipe("/a.txt", text)
    cut_parts = prepare.__globals__["cut_parts"]

    def change(*args, **kwargs):
        found = cut_parts(*args, **kwargs)
        store.pipe("/a.txt", text.replace(b"fox", b"cat"))  # as long as before
        return found

    monkeypatch.setitem(prepare.__globals__, "cut_parts", change)
    with pytest.raises(UserError, match=r"memory:///a.txt has changed while it was read"):
        make(tmp_path / "out", "memory://a.txt")
    assert not (tmp_path / "out").exists()


def test_a_store_that_fails_is_one_line_with_the_url(tmp_path, store, monkeypatch):
    store.pipe("/a.txt", write_text(tmp_path / "a.txt", 50).read_bytes())
    (file,) = find_files(["memory://a.txt"])

    class Broken:
        def read(self, size: int) -> bytes:
            raise RuntimeError("connection\nlost")

        def tell(self) -> int:
            return 0

        def close(self) -> None:
            pass

    monkeypatch.setattr(type(store), "open", lambda *args, **kwargs: Broken())
    with pytest.raises(UserError, match=r"^memory:///a.txt cannot be read \(connection lost\)$"):
        list(read_documents(file))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://none.txt", "does not exist"),
        ("memory://*.txt", "matches no file"),
        ("memory://a.png", "of an unknown kind"),
        ("memory://empty", "holds no file of text"),
        ("nonsense://a.txt", r"cannot be read \(.*nonsense"),
    ],
)
def test_what_cannot_be_read(url, message, store):
    store.pipe("/a.png", b"x")
    store.pipe("/empty/b.png", b"x")
    with pytest.raises(UserError, match=message) as error:
        find_files([url])
    assert url.split("://")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r"reading s3://bucket/a.txt needs a package: Install s3fs"):
        remote.remote_files("s3://bucket/a.txt")


@pytest.mark.parametrize("name", ["a.txt", "C:/a.txt", "folder/a:b.txt", "-", "a//b"])
def test_paths_are_no_urls(name):
    assert not remote.is_url(name)
