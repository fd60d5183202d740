"""The corpus on disk: token ids, the bounds of sentences and documents, and a manifest.

    DIR/tokenizer.json                    the WordPiece tokenizer that made the ids
    DIR/{split}-{i:05d}.tokens.npy        uint16 (vocab_size <= 65536) or uint32 [n_tokens]: ids without special tokens
    DIR/{split}-{i:05d}.sentences.npy     int64 [n_sentences + 1]: token offset of each sentence, then the end
    DIR/{split}-{i:05d}.documents.npy     int64 [n_documents + 1]: sentence offset of each document, then the end
    DIR/manifest.json                     counts, sizes and sha256 of every file, the special ids, the unigram entropy,
                                          how it was made (`source`), what it holds (`report`; not in older corpora),
                                          and the sha256 of all this (`manifest_sha256`; not in older corpora)
    DIR/verified.json                     files that were compared with their sha256 (`verify_files`), and when

A shard may have a weight in the manifest: how often an epoch of training has its documents (1 without one).
There are two splits, "train" and "heldout". No split, document or sentence is empty. Offsets count within a shard, and
each document lies in one shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..text.special_tokens import MAX_VOCAB_SIZE, SpecialTokens

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
ARRAYS = ("tokens", "sentences", "documents")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERIFIED = "verified.json"
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
    return name in (MANIFEST, TOKENIZER, VERIFIED) or re.fullmatch(pattern, name) is not None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest's content, independent of the layout of the file and without the field ``sha256``."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_manifest(path: Path, manifest: Any) -> None:
    """Raises CorpusError unless ``manifest``, the JSON read from ``path``, is one that a `CorpusWriter` can write."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise CorpusError(f"{path} is not a corpus manifest ({what}): prepare the corpus again")

    def is_integer(value: Any, least: int, most: int = 1 << 62) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    def is_sha256(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None

    require(isinstance(manifest, dict), "not a JSON object")
    version = manifest.get("version")
    require(is_integer(version, 1), "no version")
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has format version {version!r}; this fusebert reads version {FORMAT_VERSION}: prepare the corpus "
            "again"
        )
    vocab_size, entropy = manifest.get("vocab_size"), manifest.get("unigram_entropy")
    require(is_integer(vocab_size, len(SpecialTokens._fields), MAX_VOCAB_SIZE), "vocab_size")
    require(isinstance(entropy, float) or is_integer(entropy, 0), "unigram_entropy")
    require(-1e-9 <= entropy <= math.log(vocab_size) + 1e-9, "unigram_entropy")
    require(isinstance(manifest.get("tokenizer"), dict) and is_sha256(manifest["tokenizer"].get("sha256")), "tokenizer")
    require(isinstance(manifest.get("source"), dict), "source")
    require(isinstance(manifest.get("report", {}), dict), "report")
    special = manifest.get("special_tokens")
    require(isinstance(special, dict) and set(special) == set(SpecialTokens._fields), "special_tokens")
    require(all(is_integer(i, 0) for i in special.values()), "special_tokens")
    require(max(special.values()) < vocab_size, "a special token is outside the vocabulary")
    require(len(set(special.values())) == len(special), "two special tokens have one id")
    splits = manifest.get("splits")
    for name in SPLITS:
        require(isinstance(splits, dict) and isinstance(splits.get(name), dict), f"split {name}")
        shards = splits[name].get("shards")
        require(isinstance(shards, list) and len(shards) > 0, f"split {name} is empty")
        for shard in shards:
            require(
                isinstance(shard, dict)
                and all(is_integer(shard.get(key), 1) for key in ARRAYS)
                and shard["documents"] <= shard["sentences"] <= shard["tokens"],
                f"a shard of {name}",
            )
            weight = shard.get("weight", 1.0)
            require(type(weight) in (int, float) and 1 <= weight <= 1000, f"the weight of a shard of {name}")
            files = shard.get("files")
            require(
                isinstance(files, dict)
                and set(files) == set(ARRAYS)
                and all(
                    isinstance(f, dict) and is_integer(f.get("bytes"), 1) and is_sha256(f.get("sha256"))
                    for f in files.values()
                ),
                f"files of a shard of {name}",
            )
        for key in ARRAYS:
            total = splits[name].get(key)
            require(is_integer(total, 1) and total == sum(s[key] for s in shards), f"{key} of the split {name}")
    # Older corpora have no hash of the manifest. Without one, an unknown field is a known field with a damaged name.
    unknown = sorted(set(manifest) - {"sha256", *_FIELDS})
    if "sha256" in manifest:
        require(manifest["sha256"] == manifest_sha256(manifest), "damaged: its sha256 is that of another content")
    else:
        require(not unknown, f"unknown field {', '.join(map(repr, unknown))}")


_FIELDS = ("version", "vocab_size", "tokenizer", "special_tokens", "unigram_entropy", "source", "report", "splits")
