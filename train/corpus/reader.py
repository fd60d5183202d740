"""Reads a corpus through memory maps."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...model.json_file import read_json
from ..text.special_tokens import SpecialTokens
from .cut_short import check_length, remember
from .format import (
    ARRAYS,
    MANIFEST,
    OFFSET_DTYPE,
    SPLITS,
    TOKENIZER,
    CorpusError,
    array_file,
    check_manifest,
    file_sha256,
    token_dtype,
)
from .verify import verify_files

SPACES = ("Ġ", "▁")  # how byte-level BPE and unigram models write the space before a word


class Shard:
    """The three arrays of a shard, mapped into memory on first access.

    A pickled Shard holds its location and counts only, so a worker process maps the files itself. It refuses a file
    that replaced the one mapped in the process that pickled the Shard.

    Args:
        directory: the corpus.
        split: "train" or "heldout".
        index: the shard's number.
        vocab_size: V, which decides the dtype of the tokens.
        counts: the shard's entry in the manifest.

    Attributes:
        num_tokens, num_sentences, num_documents: the counts in the manifest.
        weight: how often an epoch of training has the shard's documents.
    """

    def __init__(self, directory: Path, split: str, index: int, vocab_size: int, counts: Mapping[str, Any]) -> None:
        # File names are computed, never read from the manifest: a manifest cannot point outside the directory.
        self.paths = {array: directory / array_file(split, index, array) for array in ARRAYS}
        self._vocab_size = vocab_size
        self._mapped: dict[str, tuple[int, int]] = {}  # device and inode of each array
        self.num_tokens = counts["tokens"]
        self.num_sentences = counts["sentences"]
        self.num_documents = counts["documents"]
        self.weight = float(counts.get("weight", 1.0))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ARRAYS}

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [num_tokens]: ids without special tokens, sentence after sentence."""
        is_checked = "tokens" in self._mapped  # by the process that pickled this Shard: do not read all files again
        tokens = self._load("tokens", token_dtype(self._vocab_size), self.num_tokens)
        if not is_checked and (largest := int(tokens.max())) >= self._vocab_size:
            raise CorpusError(
                f"{self.paths['tokens']} is damaged: it has the id {largest}, and the vocabulary is of "
                f"{self._vocab_size}: prepare the corpus again"
            )
        return tokens

    @functools.cached_property
    def sentences(self) -> np.ndarray:
        """int64 [num_sentences + 1]: sentence s is tokens[sentences[s] : sentences[s + 1]]."""
        return self._load("sentences", OFFSET_DTYPE, self.num_sentences + 1, end=self.num_tokens)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """int64 [num_documents + 1]: document d has the sentences documents[d] … documents[d + 1] − 1."""
        return self._load("documents", OFFSET_DTYPE, self.num_documents + 1, end=self.num_sentences)

    def check(self) -> None:
        """Raises CorpusError if a mapped file has become shorter. Call it before reading from the arrays."""
        for name in ARRAYS:
            if (array := self.__dict__.get(name)) is not None:
                check_length(self.paths[name], array)

    def _load(self, name: str, dtype: np.dtype[Any], length: int, end: int | None = None) -> np.ndarray:
        path = self.paths[name]
        try:
            stat = os.stat(path)
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            remember(path, array)
        except (OSError, ValueError, EOFError) as error:
            raise CorpusError(f"{path} cannot be read ({error}): prepare the corpus again") from error
        if array.dtype != dtype or array.shape != (length,):
            raise CorpusError(
                f"{path} is damaged: {array.dtype} {list(array.shape)} where the manifest says {dtype} [{length}]: "
                "prepare the corpus again"
            )
        if self._mapped.setdefault(name, (stat.st_dev, stat.st_ino)) != (stat.st_dev, stat.st_ino):
            raise CorpusError(f"{path} was replaced since it was first read: start again")
        check_length(path, array)
        # Increasing offsets with the right ends cannot index outside the array they refer to.
        if end is not None and not (array[0] == 0 and array[-1] == end and bool(np.all(array[1:] > array[:-1]))):
            raise CorpusError(f"{path} is damaged: offsets do not rise from 0 to {end}: prepare the corpus again")
        return array


class Split:
    """The shards of "train" or "heldout", in order.

    Attributes:
        name: the split's name.
        shards: its shards.
        num_documents, num_sentences, num_tokens: totals over the shards.
    """

    def __init__(self, name: str, shards: list[Shard]) -> None:
        self.name = name
        self.shards = shards
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.num_sentences = sum(shard.num_sentences for shard in shards)
        self.num_tokens = sum(shard.num_tokens for shard in shards)


class Corpus:
    """A prepared corpus; `Corpus.open` makes it. It can be pickled (without the memory maps).

    Attributes:
        directory: the corpus's folder.
        manifest: the content of manifest.json.
        vocab_size: V; every id is below it.
        tokenizer_path: the tokenizer.json that made the ids.
        special: ids of the special tokens.
        unigram_entropy: −Σ p log p over the training tokens that can be masked (no special ones, so no [UNK]), in nats
            per token: the loss of a model that knows only the frequency of each token.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_path = directory / TOKENIZER
        self.special = SpecialTokens(**manifest["special_tokens"])
        self.unigram_entropy = float(manifest["unigram_entropy"])
        self._splits = {
            name: Split(
                name,
                [
                    Shard(directory, name, i, self.vocab_size, shard)
                    for i, shard in enumerate(manifest["splits"][name]["shards"])
                ],
            )
            for name in SPLITS
        }

    @classmethod
    def open(cls, directory: str | os.PathLike[str], verify: bool = False) -> Corpus:
        """Opens the corpus in ``directory``. Checks the manifest, the tokenizer's hash and the size of every file.

        Args:
            directory: the corpus's folder.
            verify: check the hash of every file too, which reads all of them.

        Raises:
            CorpusError: there is no corpus, it is incomplete, or a file is missing or damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        corpus = cls(directory, manifest)
        if not corpus.tokenizer_path.is_file():
            raise CorpusError(f"{corpus.tokenizer_path} is missing: prepare the corpus again")
        if file_sha256(corpus.tokenizer_path) != manifest["tokenizer"]["sha256"]:
            raise CorpusError(
                f"{corpus.tokenizer_path} is not the tokenizer this corpus was made with (its sha256 differs from the "
                "manifest's): restore that tokenizer, or prepare the corpus again"
            )
        for name in SPLITS:
            for shard, recorded in zip(corpus.split(name).shards, manifest["splits"][name]["shards"], strict=True):
                for array in ARRAYS:
                    _check_file(shard.paths[array], recorded["files"][array], verify)
        return corpus

    def verify(self, *, show_progress: bool = False) -> None:
        """Compares every file with its hash, as `verify_files`, which remembers the result."""
        recorded = {
            shard.paths[array].name: entry["files"][array]
            for name in SPLITS
            for shard, entry in zip(self.split(name).shards, self.manifest["splits"][name]["shards"], strict=True)
            for array in ARRAYS
        }
        verify_files(self.directory, recorded, show_progress=show_progress)

    def split(self, name: str) -> Split:
        """The split "train" or "heldout".

        Raises:
            ValueError: ``name`` is neither.
        """
        if name not in self._splits:
            raise ValueError(f"there is no split {name!r}: choose one of {', '.join(SPLITS)}")
        return self._splits[name]

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """bool [vocab_size]: True for tokens that continue a word, for whole-word masking: "##ing" of WordPiece; of the
        others every ordinary piece that does not begin with their mark of a space ("Ġ", "▁").

        Raises:
            CorpusError: tokenizer.json does not hold a tokenizer.
        """
        table = np.zeros(self.vocab_size, dtype=bool)
        try:
            model = self._tokenizer["model"]
            prefix = model.get("continuing_subword_prefix") or "##"
            is_wordpiece = model.get("type", "WordPiece") == "WordPiece"
            for token, index in vocab_of(model).items():
                longer = token.startswith(prefix) and len(token) > len(prefix)
                table[index] = longer if is_wordpiece else not token.startswith(SPACES)
            table[list(self.never_predicted)] = False
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CorpusError(f"{self.tokenizer_path} is not a tokenizer ({error!r})") from error
        return table

    @functools.cached_property
    def never_predicted(self) -> tuple[int, ...]:
        """The ids of all special tokens, also of those without a role here: masking neither chooses nor draws them.

        Raises:
            CorpusError: tokenizer.json does not hold a tokenizer.
        """
        try:
            added = [token["id"] for token in self._tokenizer.get("added_tokens") or [] if token.get("special")]
            return tuple(sorted({*self.special, *(int(index) for index in added)}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorpusError(f"{self.tokenizer_path} is not a tokenizer ({error!r})") from error

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            return json.loads(self.tokenizer_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorpusError(f"{self.tokenizer_path} is not a tokenizer ({error!r})") from error


def vocab_of(model: Mapping[str, Any]) -> Mapping[str, int]:
    """Token → id of the ``model`` in a tokenizer.json; a unigram model has a list of (piece, score)."""
    vocab = model["vocab"]
    return {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def read_manifest(directory: Path) -> dict[str, Any]:
    """The checked content of the manifest in ``directory``.

    Raises:
        CorpusError: there is no manifest, or it is damaged.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        what = "is a file, not a folder" if directory.exists() else "does not exist"
        raise CorpusError(f"{directory} {what}: make a corpus there with `fusebert prepare ... --out {directory}`")
    if not path.is_file():
        raise CorpusError(
            f"{directory} is not a finished corpus (it has no {MANIFEST}): make one with `fusebert prepare`"
        )
    try:
        manifest: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({error}): prepare the corpus again") from error
    check_manifest(path, manifest)
    return manifest


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
