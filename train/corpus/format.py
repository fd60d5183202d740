"""The corpus on disk: token ids, the bounds of sentences and documents, and a manifest.

    DIR/tokenizer.json                    the WordPiece tokenizer that made the ids
    DIR/{split}-{i:05d}.tokens.npy        uint16 (vocab_size <= 65536) or uint32 [n_tokens]: ids without special tokens
    DIR/{split}-{i:05d}.sentences.npy     int64 [n_sentences + 1]: token offset of each sentence, then the end
    DIR/{split}-{i:05d}.documents.npy     int64 [n_documents + 1]: sentence offset of each document, then the end
    DIR/manifest.json                     counts, sizes and sha256 of every file, the special ids, the unigram entropy

There are two splits, "train" and "heldout". No split, document or sentence is empty. Offsets count within a shard, and
each document lies in one shard.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..text.special_tokens import SpecialTokens

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
ARRAYS = ("tokens", "sentences", "documents")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
OFFSET_DTYPE = np.dtype("<i8")  # of sentences and documents


class CorpusError(ValueError):
    """The directory holds no complete, intact corpus, or cannot receive one. The message is one line."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of the token ids on disk: little-endian uint16 when ``vocab_size`` ids fit, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def array_file(split: str, shard: int, array: str) -> str:
    """The file name of an array ("tokens", "sentences", "documents") of a shard."""
    return f"{split}-{shard:05d}.{array}.npy"


def is_corpus_file(name: str) -> bool:
    """Whether a corpus can hold a file of this name."""
    pattern = rf"({'|'.join(SPLITS)})-\d{{5,}}\.({'|'.join(ARRAYS)})\.npy"
    return name in (MANIFEST, TOKENIZER) or re.fullmatch(pattern, name) is not None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_manifest(path: Path, manifest: Any) -> None:
    """Raises CorpusError unless ``manifest``, the JSON read from ``path``, has every field that the reader uses."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise CorpusError(f"{path} is not a corpus manifest ({what}): prepare the corpus again")

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    require(isinstance(manifest, dict), "not a JSON object")
    version = manifest.get("version")
    require(is_count(version), "no version")
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has format version {version}; this fusebert reads version {FORMAT_VERSION}: prepare the corpus "
            "again"
        )
    require(is_count(manifest.get("vocab_size")), "vocab_size")
    require(isinstance(manifest.get("unigram_entropy"), int | float), "unigram_entropy")
    require(isinstance(manifest.get("tokenizer"), dict) and "sha256" in manifest["tokenizer"], "tokenizer")
    special = manifest.get("special_tokens")
    require(isinstance(special, dict) and set(special) == set(SpecialTokens._fields), "special_tokens")
    require(all(i == 0 or is_count(i) for i in special.values()), "special_tokens")
    require(max(special.values()) < manifest["vocab_size"], "a special token is outside the vocabulary")
    splits = manifest.get("splits")
    for name in SPLITS:
        require(isinstance(splits, dict) and isinstance(splits.get(name), dict), f"split {name}")
        shards = splits[name].get("shards")
        require(isinstance(shards, list) and len(shards) > 0, f"split {name} is empty")
        for shard in shards:
            require(isinstance(shard, dict) and all(is_count(shard.get(key)) for key in ARRAYS), f"a shard of {name}")
            files = shard.get("files")
            require(
                isinstance(files, dict)
                and set(files) == set(ARRAYS)
                and all(isinstance(f, dict) and is_count(f.get("bytes")) and "sha256" in f for f in files.values()),
                f"files of a shard of {name}",
            )
