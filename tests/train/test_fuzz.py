"""Readers of random and of damaged files: the content, or an error of one line that names the file."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from small_corpus import make_corpus

from fusebert.train.batches.passages import Passages
from fusebert.train.corpus.format import CorpusError, manifest_sha256
from fusebert.train.corpus.reader import Corpus
from fusebert.train.errors import UserError
from fusebert.train.text.readers import SUFFIXES, TextFile, read_documents
from fusebert.train.text.tokenizer import load_tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
few = hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)

PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
NUMBERS = st.sampled_from([0, -1, 1, 2**16, 2**31, 2**32, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LINE = st.builds(json.dumps, JSON | st.fixed_dictionaries({"text": JSON})).map(str.encode)
TEXT = st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=200)
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)


def damaged(data: bytes, damage: list[tuple[float, int]], kept: float) -> bytes:
    """``data`` with some bytes replaced, and cut to the share ``kept``."""
    changed = bytearray(data)
    for place, byte in damage:
        if changed:
            changed[int(place * len(changed))] = byte
    return bytes(changed[: round(kept * len(changed))])


def check_message(error: Exception, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)


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
    kept=st.just(1.0) | st.floats(0, 1),
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


def places(value: Any) -> list[tuple[Any, ...]]:
    """The way to each value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [way for key, each in inner for way in [(key,), *((key, *rest) for rest in places(each))]]


def with_change(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at the place ``way``."""
    value = copy.deepcopy(value)
    inner = value
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return value


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
@hypothesis.given(damage=DAMAGE, kept=st.just(1.0) | st.floats(0, 1))
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
@hypothesis.given(damage=DAMAGE, kept=st.just(1.0) | st.floats(0, 1), suffix=st.sampled_from([".json", ".txt"]))
def test_tokenizers_with_other_bytes(
    corpus: Path, tmp_path: Path, damage: list[tuple[float, int]], kept: float, suffix: str
) -> None:
    content = (corpus / "tokenizer.json").read_bytes()
    if suffix == ".txt":
        content = "\n".join(json.loads(content)["model"]["vocab"]).encode()
    path = tmp_path / f"vocab{suffix}"
    path.write_bytes(damaged(content, damage, kept))
    load(path)
