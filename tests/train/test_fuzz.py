"""Readers of random and of damaged files: the content, or an error of one line that names the file."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from small_corpus import make_corpus

pytest.importorskip("hypothesis")
import hypothesis
from fuzzing import DAMAGE, JSON, KEPT, LINE, TEXT, check_message, damaged, few, places, with_change
from hypothesis import strategies as st

from fusebert.train.batches.passages import Passages
from fusebert.train.corpus.format import CorpusError, manifest_sha256
from fusebert.train.corpus.reader import Corpus
from fusebert.train.errors import UserError
from fusebert.train.text.readers import read_documents
from fusebert.train.text.text_file import SUFFIXES, TextFile
from fusebert.train.text.tokenizer import load_tokenizer

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path: Path) -> list[str] | None:
    """The documents, or None for an error as it should be."""
    try:
        return list(read_documents(TextFile(path, str(path))))
    except UserError as error:
        check_message(error, path)
        return None


@few
@hypothesis.given(
    suffix=st.sampled_from(SUFFIXES),
    content=st.lists(TEXT | LINE, max_size=8).map(b"\n".join),
    damage=DAMAGE,
    kept=KEPT,
)
def test_text_files(tmp_path: Path, suffix: str, content: bytes, damage: list[tuple[float, int]], kept: float) -> None:
    name, _, packing = suffix[1:].partition(".")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged(PACKERS["." + packing if packing else ""](content), damage, kept))
    documents = read(path)
    for document in documents or []:
        assert document
        assert not document.isspace()
        assert "\0" not in document
        document.encode()
    if name == "txt" and documents is not None and not packing and not damage and kept == 1.0:
        assert "".join("".join(documents).split()) == "".join(content.decode().removeprefix("\ufeff").split())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def use(directory: Path) -> bool:
    """Opens a corpus, maps and reads everything; False if an error says why not."""
    try:
        opened = Corpus.open(directory)
        for name in ("train", "heldout"):
            passages = Passages(opened.split(name), 64)
            passages.read(np.arange(len(passages)))
        assert len(opened.continues_word) == opened.vocab_size
    except CorpusError as error:
        check_message(error, directory)
        return False
    return True


@few
@hypothesis.given(data=st.data(), new=JSON, signed=st.booleans())
def test_manifests_with_another_value(corpus: Path, data: Any, new: Any, signed: bool) -> None:
    path = corpus / "manifest.json"
    original = path.read_bytes()
    manifest = json.loads(original)
    way = data.draw(st.sampled_from([way for way in places(manifest) if way[0] != "sha256"]))
    changed = with_change(manifest, way, new)
    if signed:
        changed["sha256"] = manifest_sha256(changed)
    try:
        path.write_text(json.dumps(changed))
        assert use(corpus) is False or signed or changed == manifest
    finally:
        path.write_bytes(original)


@few
@hypothesis.given(damage=DAMAGE, kept=KEPT)
def test_manifests_with_other_bytes(corpus: Path, damage: list[tuple[float, int]], kept: float) -> None:
    path = corpus / "manifest.json"
    original = path.read_bytes()
    try:
        path.write_bytes(damaged(original, damage, kept))
        if use(corpus):
            assert json.loads(path.read_bytes()) == json.loads(original)
    finally:
        path.write_bytes(original)


def load(path: Path) -> None:
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        check_message(error, path)
        return
    ids = tokenizer.encode("The fox lives in the forest.", add_special_tokens=False).ids
    assert max(ids, default=0) < 1 << 22


@few
@hypothesis.given(data=st.data(), new=JSON)
def test_tokenizers_with_another_value(corpus: Path, tmp_path: Path, data: Any, new: Any) -> None:
    tokenizer = json.loads((corpus / "tokenizer.json").read_bytes())
    ways = places(tokenizer)
    ways = [way for way in ways if way[:2] != ("model", "vocab")] + [w for w in ways if w[:2] == ("model", "vocab")][:9]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(with_change(tokenizer, data.draw(st.sampled_from(ways)), new)))
    load(path)


@few
@hypothesis.given(damage=DAMAGE, kept=KEPT, suffix=st.sampled_from([".json", ".txt"]))
def test_tokenizers_with_other_bytes(
    corpus: Path, tmp_path: Path, damage: list[tuple[float, int]], kept: float, suffix: str
) -> None:
    content = (corpus / "tokenizer.json").read_bytes()
    if suffix == ".txt":
        content = "\n".join(json.loads(content)["model"]["vocab"]).encode()
    path = tmp_path / f"vocab{suffix}"
    path.write_bytes(damaged(content, damage, kept))
    load(path)
