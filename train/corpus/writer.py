"""Writes a corpus: into a directory beside its destination, which takes the destination's name when it is complete.

The manifest is written last, so an interrupted run leaves no directory that looks finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...model.atomic import replace_file, sync_directory
from ...model.json_file import MOST_BYTES, read_json
from ..text.special_tokens import MAX_VOCAB_SIZE, special_ids
from ..text.tokenizer import KINDS
from .format import (
    ARRAYS,
    FORMAT_VERSION,
    MANIFEST,
    OFFSET_DTYPE,
    SPLITS,
    TOKENIZER,
    CorpusError,
    array_file,
    file_sha256,
    is_corpus_file,
    manifest_sha256,
    token_dtype,
)
from .reader import Corpus, vocab_of
from .work_folder import WorkFolder, work_path

SHARD_TOKENS = 1 << 25  # 64 MiB of uint16: bounds the writer's memory, and gives few files even at 10⁹ tokens
SENTENCE_COST = 4  # a sentence counts as at least so many tokens, because its offset takes their memory


class CorpusWriter:
    """Writes a corpus; use it as a context manager.

        with CorpusWriter("data/mine", "tokenizer.json") as writer:
            writer.add("train", [[17, 4, 99], [25, 6]])  # a document of two sentences
            writer.add("heldout", [[17, 30]])
            writer.finish({"inputs": ["mine.txt"]})

    All files go to a folder ``DIR.partial-…``, which `finish` renames to ``DIR``. Leaving the block without `finish`
    removes them.

    Args:
        directory: destination of the corpus; missing parent folders are made.
        tokenizer_file: a WordPiece tokenizer.json with the five special tokens, copied into the corpus.
        overwrite: replace an existing corpus once the new one is complete.
        shard_tokens: a shard ends with the document (the block, in `add_block`) that brings it to this many tokens, or
            to a quarter as many sentences.

    Raises:
        CorpusError: the destination exists (and is no corpus, or ``overwrite`` is False), or tokenizer_file is not
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
        self.special = special_ids(vocab)
        self._overwrite = overwrite
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(self.vocab_size)
        self._frequency = np.zeros(self.vocab_size)
        self._shards: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        self._pending: dict[tuple[str, float], _Pending] = {}
        self._place = self.directory.resolve()  # "." and symbolic links have no usable name of their own
        self._folder = WorkFolder.make(self._place, "partial")
        self.partial = self._folder.path
        try:
            _write_file(self.partial / TOKENIZER, Path(tokenizer_file).read_bytes())
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
        """Removes the files written so far; a no-op after `finish`."""
        self._folder.remove()

    def add(self, split: str, sentences: Iterable[Sequence[int]]) -> None:
        """Appends one document: its sentences as token ids, without special tokens. Empty sentences are left out, and
        so is a document without tokens.

        Raises:
            ValueError: an id is outside the vocabulary, or ``split`` is unknown.
        """
        arrays = [np.asarray(ids, dtype=np.int64) for ids in sentences]
        if arrays:
            self.add_block(split, np.concatenate(arrays), [len(ids) for ids in arrays], [len(arrays)])

    def add_block(
        self,
        split: str,
        tokens: np.ndarray,
        sentence_lengths: Sequence[int] | np.ndarray,
        document_lengths: Sequence[int] | np.ndarray,
        weight: float = 1.0,
    ) -> None:
        """Appends many documents at once.

        Args:
            split: "train" or "heldout".
            tokens: integers [n], the ids, sentence after sentence.
            sentence_lengths: tokens in each sentence; their sum is n. Empty sentences are left out.
            document_lengths: sentences in each document; their sum is ``len(sentence_lengths)``.
            weight: how often an epoch of training has them. A shard has documents of one weight.

        Raises:
            ValueError: the lengths do not add up, an id is outside the vocabulary, or ``split`` is unknown.
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
        # Non-empty sentences of each document: differences of the running count at the document's bounds.
        kept = per_sentence > 0
        running = np.concatenate(([0], np.cumsum(kept)))
        bounds = np.concatenate(([0], np.cumsum(per_document)))
        per_document = running[bounds[1:]] - running[bounds[:-1]]
        pending = self._pending.setdefault((split, weight), _Pending())
        pending.tokens.append(tokens.astype(self._dtype))
        pending.sentences.append(per_sentence[kept])
        pending.documents.append(per_document[per_document > 0])
        pending.num_tokens += len(tokens)
        pending.num_sentences += len(pending.sentences[-1])
        if split == "train":
            self._frequency += weight * np.bincount(tokens, minlength=self.vocab_size)
        if max(pending.num_tokens, SENTENCE_COST * pending.num_sentences) >= self._shard_tokens:
            self._write_shard(split, weight)

    def finish(self, source: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> Corpus:
        """Writes the pending documents and the manifest, and moves the corpus to its destination.

        Args:
            source: a record of how the corpus was made; any JSON.
            report: what the corpus holds, see `report`; any JSON.

        Raises:
            CorpusError: a split has no document.
            OSError: a write failed, for example because the disk is full; the destination is unchanged.
        """
        for split, weight in sorted(self._pending):
            self._write_shard(split, weight)
        for split in SPLITS:
            if not self._shards[split]:
                raise CorpusError(f"the split {split!r} of {self.directory} would have no document: give more text")
        predicted = self._frequency.copy()
        predicted[list(self.special)] = 0  # never masked
        probability = predicted[predicted > 0] / max(predicted.sum(), 1)
        manifest = {
            "version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "tokenizer": {"sha256": file_sha256(self.partial / TOKENIZER)},
            "special_tokens": self.special._asdict(),
            "unigram_entropy": 0.0 - math.fsum(probability * np.log(probability)),  # not -0.0
            "source": dict(source),
            "report": dict(report or {}),
            "splits": {
                split: {**{key: sum(shard[key] for shard in shards) for key in ARRAYS}, "shards": shards}
                for split, shards in self._shards.items()
            },
        }
        manifest = json.loads(json.dumps(manifest))  # as it will be read
        manifest["sha256"] = manifest_sha256(manifest)
        _write_file(self.partial / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        self._move_to_destination()
        return Corpus.open(self.directory)

    def _write_shard(self, split: str, weight: float) -> None:
        pending = self._pending.pop((split, weight))
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
            files[name] = _write_file(self.partial / array_file(split, index, name), header.getvalue(), array.data)
        self._shards[split].append(
            {
                "documents": len(arrays["documents"]) - 1,
                "sentences": len(arrays["sentences"]) - 1,
                "tokens": len(arrays["tokens"]),
                "files": files,
                **({"weight": weight} if weight != 1.0 else {}),
            }
        )

    def _move_to_destination(self) -> None:
        check_destination(self.directory, self._overwrite)
        with contextlib.ExitStack() as stack:
            replaced = work_path(self._place, "replaced")
            if self._place.exists():
                old = WorkFolder(self._place)
                stack.callback(old.release)
                os.rename(self._place, replaced)
            try:
                os.rename(self.partial, self._place)
            except BaseException:
                if replaced.exists():
                    os.rename(replaced, self._place)
                raise
            sync_directory(self._place.parent)
            shutil.rmtree(replaced, ignore_errors=True)


class _Pending:
    """The documents added to a split since its last shard."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.sentences: list[np.ndarray] = []  # lengths in tokens
        self.documents: list[np.ndarray] = []  # lengths in sentences
        self.num_tokens = 0
        self.num_sentences = 0


def check_destination(directory: Path, overwrite: bool) -> None:
    """Checks that a corpus may be put at ``directory``.

    Raises:
        CorpusError: ``directory`` is a file, the current folder, a folder with other files, or holds a corpus and
            ``overwrite`` is False.
    """
    if not directory.exists():
        return
    if directory.resolve() == Path.cwd():
        raise CorpusError(f"{directory} is the current folder, which cannot be replaced: name a folder in it")
    if not directory.is_dir():
        raise CorpusError(f"{directory} is a file, not a folder: choose another place for the corpus")
    if (directory / MANIFEST).is_file():
        if not overwrite:
            raise CorpusError(f"{directory} already holds a corpus: give --overwrite to replace it, or another --out")
        for path in directory.iterdir():
            if not is_corpus_file(path.name):  # replacing the folder would delete it
                raise CorpusError(
                    f"{directory} holds {path.name}, which is no part of a corpus: move that file away, or choose "
                    "another --out"
                )
    elif any(directory.iterdir()):
        raise CorpusError(f"{directory} is not empty and is not a corpus: choose another place for the corpus")


def _offsets(lengths: list[np.ndarray]) -> np.ndarray:
    """int64 [n + 1]: 0, then the running sums of n lengths."""
    return np.concatenate([np.zeros(1, dtype=np.int64), *lengths]).cumsum().astype(OFFSET_DTYPE)


def _read_vocab(path: Path) -> dict[str, int]:
    """Token → id of a tokenizer.json.

    Raises:
        CorpusError: the file is another kind of tokenizer, or lacks special tokens.
    """
    try:
        data = read_json(path, 8 * MOST_BYTES)
        vocab = {
            **vocab_of(data["model"]),
            **{entry["content"]: entry["id"] for entry in data.get("added_tokens") or []},
        }
        if data["model"].get("type", "WordPiece") not in KINDS:
            raise ValueError(f"its model is none of {', '.join(KINDS)}")
        for token, index in vocab.items():
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MAX_VOCAB_SIZE:
                raise ValueError(f"the id of {token!r} is {index!r}, not an integer in [0, {MAX_VOCAB_SIZE})")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} is not a tokenizer.json ({error})") from error
    try:
        special_ids(vocab)
    except ValueError as error:
        raise CorpusError(f"the tokenizer {path} {error}") from error
    return vocab


def _write_file(path: Path, *parts: bytes | memoryview) -> dict[str, Any]:
    """Writes a file durably; returns its size and sha256, computed from ``parts``, not read back."""
    digest, size = hashlib.sha256(), 0
    with replace_file(path) as partial, open(partial, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += memoryview(part).nbytes
    return {"bytes": size, "sha256": digest.hexdigest()}
