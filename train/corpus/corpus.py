"""The corpus on disk: token ids as memory-mapped arrays, their sentences and documents, and a manifest.

    DIR/tokenizer.json                    the WordPiece tokenizer that made the ids
    DIR/{split}-{i:05d}.tokens.npy        uint16 (vocab_size <= 65536) or uint32 [n_tokens]: ids without special tokens
    DIR/{split}-{i:05d}.sentences.npy     int64 [n_sentences + 1]: token offset where each sentence starts, and the end
    DIR/{split}-{i:05d}.documents.npy     int64 [n_documents + 1]: sentence where each document starts, and the end
    DIR/manifest.json                     counts, sizes and sha256 of every file, the special ids, the unigram entropy

Splits are "train" and "heldout"; neither is empty, and no document and no sentence is. Offsets count within their
shard, and a document lies in one shard. `CorpusWriter` fills a sibling directory and renames it at the very end, the
manifest having been written last: whatever stops it, no directory is left that looks finished.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHARD_TOKENS = 1 << 25  # 64 MiB of uint16: what the writer holds in memory, and few files even at 10⁹ tokens
_ARRAYS = ("tokens", "sentences", "documents")


class CorpusError(ValueError):
    """The directory is no corpus, is half written, or is damaged. The message is one line."""


class SpecialTokens(NamedTuple):
    """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that token ids below ``vocab_size`` are stored in: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Shard:
    """Three arrays of one split, mapped into memory when first read. Pickles as its path and counts, so that worker
    processes map the files themselves.

    Attributes:
        num_tokens, num_sentences, num_documents: as the manifest has them.
    """

    def __init__(self, stem: Path, vocab_size: int, counts: Mapping[str, int]) -> None:
        self._stem = stem
        self._vocab_size = vocab_size
        self.num_tokens = counts["tokens"]
        self.num_sentences = counts["sentences"]
        self.num_documents = counts["documents"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _ARRAYS}

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [num_tokens]: ids without special tokens, sentence after sentence."""
        return self._load("tokens", token_dtype(self._vocab_size), self.num_tokens)

    @functools.cached_property
    def sentences(self) -> np.ndarray:
        """int64 [num_sentences + 1]: sentence s is tokens[sentences[s] : sentences[s + 1]]."""
        return self._load("sentences", np.dtype("<i8"), self.num_sentences + 1, end=self.num_tokens)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """int64 [num_documents + 1]: document d has the sentences documents[d] … documents[d + 1] − 1."""
        return self._load("documents", np.dtype("<i8"), self.num_documents + 1, end=self.num_sentences)

    def path(self, name: str) -> Path:
        """The file of "tokens", "sentences" or "documents"."""
        return self._stem.with_name(f"{self._stem.name}.{name}.npy")

    def _load(self, name: str, dtype: np.dtype[Any], length: int, end: int | None = None) -> np.ndarray:
        path = self.path(name)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CorpusError(f"{path} can't be read ({error}): prepare the corpus again") from error
        if array.dtype != dtype or array.shape != (length,):
            raise CorpusError(
                f"{path} is damaged: {array.dtype} {list(array.shape)} where the manifest says {dtype} [{length}]: "
                "prepare the corpus again"
            )
        # Offsets that end where they should and never fall back can't lead outside the array they point into.
        if end is not None and not (array[0] == 0 and array[-1] == end and bool(np.all(array[1:] > array[:-1]))):
            raise CorpusError(f"{path} is damaged: offsets do not rise from 0 to {end}: prepare the corpus again")
        return array


class Split:
    """The shards of "train" or "heldout", in order, and their totals ``num_documents``, ``num_sentences``,
    ``num_tokens``."""

    def __init__(self, name: str, shards: list[Shard]) -> None:
        self.name = name
        self.shards = shards
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.num_sentences = sum(shard.num_sentences for shard in shards)
        self.num_tokens = sum(shard.num_tokens for shard in shards)


class Corpus:
    """A prepared corpus, read through memory maps; `Corpus.open` makes it. It pickles (without the maps).

    Attributes:
        directory: where it is.
        manifest: manifest.json as read.
        vocab_size: V; every id is below it.
        tokenizer_path: the tokenizer.json that made the ids.
        special: ids of the special tokens.
        unigram_entropy: −Σ p log p over the training tokens, nats a token: the loss of a model that knows only how
            frequent each token is.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_path = directory / "tokenizer.json"
        self.special = SpecialTokens(**manifest["special_tokens"])
        self.unigram_entropy = float(manifest["unigram_entropy"])
        # File names are derived from the split and the number, never read: a manifest can't point elsewhere.
        self._splits = {
            name: Split(
                name,
                [
                    Shard(directory / f"{name}-{i:05d}", self.vocab_size, shard)
                    for i, shard in enumerate(manifest["splits"][name]["shards"])
                ],
            )
            for name in SPLITS
        }

    @classmethod
    def open(cls, directory: str | os.PathLike[str], verify: bool = False) -> Corpus:
        """The corpus in ``directory``. Checks the manifest, the tokenizer's hash and the size of every file; with
        ``verify``, the hash of every file too (it reads them all).

        Raises:
            CorpusError: there is no corpus, it is half written, or a file is missing or damaged.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        if not directory.is_dir():
            what = "is a file, not a folder" if directory.exists() else "does not exist"
            raise CorpusError(f"{directory} {what}: make a corpus there with `fusebert prepare ... --out {directory}`")
        if not path.is_file():
            raise CorpusError(
                f"{directory} is not a finished corpus (it has no manifest.json): make one with `fusebert prepare`"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CorpusError(f"{path} can't be read ({error}): prepare the corpus again") from error
        _check_manifest(path, manifest)
        corpus = cls(directory, manifest)
        if not corpus.tokenizer_path.is_file():
            raise CorpusError(f"{corpus.tokenizer_path} is missing: prepare the corpus again")
        if file_sha256(corpus.tokenizer_path) != manifest["tokenizer"]["sha256"]:
            raise CorpusError(
                f"{corpus.tokenizer_path} is not the tokenizer this corpus was made with (its sha256 differs from the "
                "manifest's): put that one back, or prepare the corpus again"
            )
        for name in SPLITS:
            for shard, recorded in zip(corpus.split(name).shards, manifest["splits"][name]["shards"], strict=True):
                for array in _ARRAYS:
                    _check_file(shard.path(array), recorded["files"][array], verify)
        return corpus

    def split(self, name: str) -> Split:
        """The split "train" or "heldout".

        Raises:
            ValueError: ``name`` is another.
        """
        if name not in self._splits:
            raise ValueError(f"there is no split {name!r}: choose one of {', '.join(SPLITS)}")
        return self._splits[name]

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """bool [vocab_size]: True for ids whose token continues a word ("##ing"), for whole-word masking.

        Raises:
            CorpusError: tokenizer.json is not a WordPiece tokenizer's.
        """
        table = np.zeros(self.vocab_size, dtype=bool)
        try:
            model = json.loads(self.tokenizer_path.read_text(encoding="utf-8"))["model"]
            prefix = model.get("continuing_subword_prefix") or "##"
            for token, index in model["vocab"].items():
                table[index] = token.startswith(prefix) and len(token) > len(prefix)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CorpusError(f"{self.tokenizer_path} is not a WordPiece tokenizer ({error!r})") from error
        return table


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, recorded: Mapping[str, Any], verify: bool) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorpusError(f"{path} is missing ({error.strerror}): prepare the corpus again") from error
    if size != recorded["bytes"]:
        raise CorpusError(
            f"{path} is damaged: {size} bytes where the manifest says {recorded['bytes']}: prepare the corpus again"
        )
    if verify and file_sha256(path) != recorded["sha256"]:
        raise CorpusError(f"{path} is damaged: its sha256 differs from the manifest's: prepare the corpus again")


def _check_manifest(path: Path, manifest: Any) -> None:
    """Raises CorpusError unless ``manifest`` has every field that reading relies on, of the right kind."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise CorpusError(f"{path} is not a corpus manifest ({what}): prepare the corpus again")

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    require(isinstance(manifest, dict), "no JSON object")
    version = manifest.get("version")
    require(count(version), "no version")
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has format version {version}; this fusebert reads {FORMAT_VERSION}: prepare the corpus again"
        )
    require(count(manifest.get("vocab_size")), "vocab_size")
    require(isinstance(manifest.get("unigram_entropy"), int | float), "unigram_entropy")
    require(isinstance(manifest.get("tokenizer"), dict) and "sha256" in manifest["tokenizer"], "tokenizer")
    special = manifest.get("special_tokens")
    require(isinstance(special, dict) and set(special) == set(SpecialTokens._fields), "special_tokens")
    require(all(i == 0 or count(i) for i in special.values()), "special_tokens")
    require(max(special.values()) < manifest["vocab_size"], "a special token is outside the vocabulary")
    splits = manifest.get("splits")
    for name in SPLITS:
        require(isinstance(splits, dict) and isinstance(splits.get(name), dict), f"split {name}")
        shards = splits[name].get("shards")
        require(isinstance(shards, list) and len(shards) > 0, f"split {name} is empty")
        for shard in shards:
            require(isinstance(shard, dict) and all(count(shard.get(key)) for key in _ARRAYS), f"a shard of {name}")
            files = shard.get("files")
            require(isinstance(files, dict) and set(files) == set(_ARRAYS), f"files of a shard of {name}")
            require(
                all(isinstance(f, dict) and count(f.get("bytes")) and "sha256" in f for f in files.values()),
                f"files of a shard of {name}",
            )


class CorpusWriter:
    """Writes a corpus; use it as a context manager.

        with CorpusWriter("data/mine", "tokenizer.json") as writer:
            writer.add("train", [[17, 4, 99], [25, 6]])  # a document of two sentences
            writer.add("heldout", [[17, 30]])
            writer.finish({"inputs": ["mine.txt"]})

    Everything goes to ``DIR.partial-<process id>``, which `finish` renames to ``DIR``. Leaving the block in any other
    way removes it.

    Args:
        directory: where the corpus will be; its parent is made if need be.
        tokenizer_file: a WordPiece tokenizer.json, copied in; it has the five special tokens.
        overwrite: a corpus already there is replaced, once the new one is complete.
        shard_tokens: a shard ends with the document (block, in `add_block`) that brings it to this many tokens.

    Raises:
        CorpusError: something is there already (and is no corpus, or ``overwrite`` is False), or tokenizer_file is not
            such a tokenizer.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        tokenizer_file: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.directory = Path(directory)
        check_destination(self.directory, overwrite)
        vocab = _read_vocab(Path(tokenizer_file))
        self.vocab_size = max(vocab.values()) + 1
        self.special = SpecialTokens(*(vocab[token] for token in SPECIAL_TOKENS))
        self._overwrite = overwrite
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(self.vocab_size)
        self._frequency = np.zeros(self.vocab_size, dtype=np.int64)
        self._shards: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        self._pending = {name: _Pending() for name in SPLITS}
        self._place = self.directory.resolve()  # "." and links have their name elsewhere
        self.partial = self._place.with_name(f"{self._place.name}.partial-{os.getpid()}")
        self._place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)  # of a process that died and had the same number
        self.partial.mkdir()
        try:
            _write_bytes(self.partial / "tokenizer.json", Path(tokenizer_file).read_bytes())
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Removes what was written, unless `finish` has made it a corpus."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, split: str, sentences: Iterable[Sequence[int]]) -> None:
        """Appends one document: its sentences as token ids, without special tokens. Empty sentences are left out, and
        so is a document that has no other.

        Raises:
            ValueError: an id is outside the vocabulary, or there is no such split.
        """
        arrays = [np.asarray(ids, dtype=np.int64) for ids in sentences]
        if arrays:
            self.add_block(split, np.concatenate(arrays), [len(ids) for ids in arrays], [len(arrays)])

    def add_block(
        self, split: str, tokens: np.ndarray, sentence_lengths: Sequence[int], document_lengths: Sequence[int]
    ) -> None:
        """Appends many documents at once.

        Args:
            split: "train" or "heldout".
            tokens: integers [n], the ids, sentence after sentence.
            sentence_lengths: tokens in each sentence; together n. Those of length 0 are left out.
            document_lengths: sentences in each document; together ``len(sentence_lengths)``.

        Raises:
            ValueError: the lengths do not add up, an id is outside the vocabulary, or there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        tokens = np.asarray(tokens)
        per_sentence = np.asarray(sentence_lengths, dtype=np.int64)
        per_document = np.asarray(document_lengths, dtype=np.int64)
        if per_sentence.sum() != len(tokens) or per_document.sum() != len(per_sentence):
            raise ValueError(
                f"lengths do not add up: {len(tokens)} tokens, sentence_lengths of {per_sentence.sum()} tokens in "
                f"{len(per_sentence)} sentences, document_lengths of {per_document.sum()} sentences"
            )
        if not len(tokens):
            return
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}), the vocabulary; got {tokens.min()} to {tokens.max()}"
            )
        # Sentences kept, counted by document: differences of the running count at each document's bounds.
        kept = per_sentence > 0
        running = np.concatenate(([0], np.cumsum(kept)))
        bounds = np.concatenate(([0], np.cumsum(per_document)))
        per_document = running[bounds[1:]] - running[bounds[:-1]]
        pending = self._pending[split]
        pending.tokens.append(tokens.astype(self._dtype))
        pending.sentences.append(per_sentence[kept])
        pending.documents.append(per_document[per_document > 0])
        pending.num_tokens += len(tokens)
        if split == "train":
            self._frequency += np.bincount(tokens, minlength=self.vocab_size)
        if pending.num_tokens >= self._shard_tokens:
            self._write_shard(split)

    def finish(self, source: Mapping[str, Any]) -> Corpus:
        """Writes what is pending and the manifest, and puts the corpus in its place.

        Args:
            source: how the corpus was made, for the reader; any JSON.

        Raises:
            CorpusError: a split has no document.
            OSError: no space left, for instance; nothing is left in the corpus's place then.
        """
        for split in SPLITS:
            if self._pending[split].num_tokens:
                self._write_shard(split)
            if not self._shards[split]:
                raise CorpusError(f"the split {split!r} of {self.directory} would have no document: give more text")
        probability = self._frequency[self._frequency > 0] / self._frequency.sum()
        manifest = {
            "version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "tokenizer": {"sha256": file_sha256(self.partial / "tokenizer.json")},
            "special_tokens": self.special._asdict(),
            "unigram_entropy": -math.fsum(probability * np.log(probability)),
            "source": dict(source),
            "splits": {
                split: {**{key: sum(shard[key] for shard in shards) for key in _ARRAYS}, "shards": shards}
                for split, shards in self._shards.items()
            },
        }
        _write_bytes(self.partial / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        _sync_directory(self.partial)
        self._put_in_place()
        return Corpus.open(self.directory)

    def _write_shard(self, split: str) -> None:
        pending, self._pending[split] = self._pending[split], _Pending()
        arrays = {
            "tokens": np.concatenate(pending.tokens),
            "sentences": _offsets(pending.sentences),
            "documents": _offsets(pending.documents),
        }
        index = len(self._shards[split])
        files = {}
        for name, array in arrays.items():
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
            files[name] = _write_bytes(self.partial / f"{split}-{index:05d}.{name}.npy", header.getvalue(), array.data)
        self._shards[split].append(
            {
                "documents": len(arrays["documents"]) - 1,
                "sentences": len(arrays["sentences"]) - 1,
                "tokens": len(arrays["tokens"]),
                "files": files,
            }
        )

    def _put_in_place(self) -> None:
        check_destination(self.directory, self._overwrite)
        replaced = self._place.with_name(f"{self._place.name}.replaced-{os.getpid()}")
        try:
            if self._place.exists():
                os.rename(self._place, replaced)
            os.rename(self.partial, self._place)
        except BaseException:
            if replaced.exists() and not self._place.exists():
                os.rename(replaced, self._place)
            raise
        _sync_directory(self._place.parent)
        shutil.rmtree(replaced, ignore_errors=True)


class _Pending:
    """What a split has received since its last shard."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.sentences: list[np.ndarray] = []  # lengths in tokens
        self.documents: list[np.ndarray] = []  # lengths in sentences
        self.num_tokens = 0


def check_destination(directory: Path, overwrite: bool) -> None:
    """Raises CorpusError when a corpus may not be put at ``directory``: a file, the current folder, one with something
    else in it, or a corpus that ``overwrite`` does not release."""
    if not directory.exists():
        return
    if directory.resolve() == Path.cwd():
        raise CorpusError(f"{directory} is the current folder, which can't be replaced: name a folder in it")
    if not directory.is_dir():
        raise CorpusError(f"{directory} is a file, not a folder: choose another place for the corpus")
    if (directory / "manifest.json").is_file():
        if not overwrite:
            raise CorpusError(f"{directory} already holds a corpus: give --overwrite to replace it, or another --out")
        try:
            _check_names(directory)
        except CorpusError as error:
            raise CorpusError(f"{error}: it will not be replaced") from None
    elif any(directory.iterdir()):
        raise CorpusError(f"{directory} is not empty and is not a corpus: choose another place for the corpus")


def _check_names(directory: Path) -> None:
    """Raises CorpusError when ``directory`` holds a file that is no part of a corpus: replacing would delete it."""
    for path in directory.iterdir():
        if path.name not in ("manifest.json", "tokenizer.json") and not re.fullmatch(
            rf"({'|'.join(SPLITS)})-\d{{5,}}\.({'|'.join(_ARRAYS)})\.npy", path.name
        ):
            raise CorpusError(f"{directory} holds {path.name}, which is no part of a corpus")


def _offsets(lengths: list[np.ndarray]) -> np.ndarray:
    """int64 [n + 1]: 0 and the running sums of n lengths."""
    return np.concatenate([np.zeros(1, dtype=np.int64), *lengths]).cumsum().astype("<i8")


def _read_vocab(path: Path) -> dict[str, int]:
    """Token → id of a tokenizer.json, with the special tokens; raises CorpusError when it is no such thing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocab = {
            **data["model"]["vocab"],
            **{entry["content"]: entry["id"] for entry in data.get("added_tokens") or []},
        }
        if data["model"].get("type", "WordPiece") != "WordPiece" or not all(isinstance(i, int) for i in vocab.values()):
            raise ValueError("its model is not WordPiece")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} is not a WordPiece tokenizer.json ({error})") from error
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise CorpusError(f"the tokenizer {path} lacks the special tokens {', '.join(missing)}")
    return vocab


def _write_bytes(path: Path, *parts: bytes | memoryview) -> dict[str, Any]:
    """Writes and syncs a file; returns its size and sha256, taken from what was to be written, not read back."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part) if isinstance(part, bytes) else part.nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_directory(path: Path) -> None:
    """Makes the names in a directory durable (a no-op where directories can't be opened, as on Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "SPECIAL_TOKENS",
    "SPLITS",
    "Corpus",
    "CorpusError",
    "CorpusWriter",
    "Shard",
    "SpecialTokens",
    "Split",
    "check_destination",
    "file_sha256",
    "token_dtype",
]
