"""Corpora in which every token of a split has its own id, so that a test can find it in the batches.

Token number t of a split (in corpus order) has the id FIRST + t. Every third id continues a word.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fusebert.model import IGNORE, PackedBatch
from fusebert.train.batches.shape import BatchShape
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.writer import CorpusWriter
from fusebert.train.text.special_tokens import SPECIAL_TOKENS, SpecialTokens

SPECIAL = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
FIRST = len(SPECIAL)

Documents = Sequence[Sequence[int]]  # for each document the lengths of its sentences


def continues_word(vocab_size: int) -> np.ndarray:
    """The ids of numbered tokens that are "##" pieces."""
    ids = np.arange(vocab_size)
    return (ids >= FIRST) & (ids % 3 == 1)


@dataclasses.dataclass
class MemoryShard:
    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    weight: float = 1.0

    def check(self) -> None:
        """As of a `Shard`: no file can become shorter here."""


@dataclasses.dataclass
class MemorySplit:
    """A `Split` in memory, in shards of ``per_shard`` documents, with ``weights`` in turn."""

    documents: Documents
    per_shard: int = 1 << 30
    name: str = "train"
    weights: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        self.shards, first = [], FIRST
        for i in range(0, len(self.documents), self.per_shard):
            documents = self.documents[i : i + self.per_shard]
            sentences = np.cumsum([0, *(n for document in documents for n in document)])
            tokens = np.arange(first, first + sentences[-1])
            bounds = np.cumsum([0, *(len(document) for document in documents)])
            weight = self.weights[len(self.shards) % len(self.weights)]
            self.shards.append(MemoryShard(tokens.astype(np.uint32), sentences.astype(np.int64), bounds, weight))
            first += len(tokens)
        self.num_tokens = first - FIRST
        self.document_of = np.repeat(np.arange(len(self.documents)), [sum(d) for d in self.documents])


class MemoryCorpus:
    """A `Corpus` in memory, as far as batches need it; both splits are the same text."""

    def __init__(self, documents: Documents, per_shard: int = 1 << 30, weights: Sequence[float] = (1.0,)) -> None:
        self.text = MemorySplit(documents, per_shard, weights=weights)
        self.special = SPECIAL
        self.never_predicted = tuple(SPECIAL)
        self.vocab_size = FIRST + self.text.num_tokens
        self.continues_word = continues_word(self.vocab_size)

    def split(self, name: str) -> MemorySplit:
        return dataclasses.replace(self.text, name=name)


def write_numbered(directory: Path, train: Documents, heldout: Documents) -> Corpus:
    """A corpus on disk, of several shards; both splits are numbered from FIRST."""
    size = FIRST + max(sum(map(sum, documents)) for documents in (train, heldout))
    pieces = continues_word(size)
    names = [*SPECIAL_TOKENS, *(f"##{i}" if pieces[i] else f"w{i}" for i in range(FIRST, size))]
    tokenizer = directory.with_suffix(".tokenizer.json")
    tokenizer.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {n: i for i, n in enumerate(names)}}}))
    with CorpusWriter(directory, tokenizer, shard_tokens=1000) as writer:
        for split, documents in (("train", train), ("heldout", heldout)):
            first = FIRST
            for document in documents:
                ends = first + np.cumsum([0, *document])
                writer.add(split, [range(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)])
                first = int(ends[-1])
        return writer.finish({})


def random_documents(rng: np.random.Generator, tokens: int, single: float = 0.3) -> Documents:
    """Documents like real ones, of about ``tokens`` tokens together: sentences of 22 tokens in the mean, a share
    ``single`` of the documents with one sentence, the others with about ten (both log-normal)."""
    documents, total = [], 0
    while total < tokens:
        count = 1 if rng.random() < single else 1 + int(rng.lognormal(1.8, 1.0))
        documents.append(np.maximum(1, rng.lognormal(np.log(22) - 0.25, 0.7, count)).astype(int).tolist())
        total += sum(documents[-1])
    return documents


@dataclasses.dataclass
class Segment:
    """An example found in a batch: original ids of A and of B, without special tokens; label −100 for none."""

    a: list[int]
    b: list[int]
    label: int
    num_masked: int


def same_batches(one: Sequence[PackedBatch], two: Sequence[PackedBatch]) -> bool:
    """Whether two lists of batches are equal, types included."""

    def fields(batch: PackedBatch) -> list[object]:
        values = vars(batch).values()
        return [(v.dtype, v.numpy().tobytes()) if isinstance(v, torch.Tensor) else v for v in values]

    return [fields(batch) for batch in one] == [fields(batch) for batch in two]


def segments_of(batch: PackedBatch, shape: BatchShape) -> list[Segment]:
    """The examples in a batch, unmasked; asserts what must hold for every batch."""
    T, S, M, seqlen = dataclasses.astuple(shape)
    assert batch.max_seqlen == seqlen
    for name, size, dtype in (
        *((name, T, torch.int64) for name in ("input_ids", "token_type_ids", "position_ids")),
        ("cu_seqlens", S + 1, torch.int32),
        *((name, M, torch.int64) for name in ("masked_positions", "masked_labels")),
        ("nsp_labels", S, torch.int64),
    ):
        tensor = getattr(batch, name)
        assert tensor.shape == (size,), name
        assert tensor.dtype == dtype, name

    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == T
    lengths = np.diff(bounds)
    assert lengths.min() >= 0
    assert lengths.max() <= seqlen
    expected_positions = np.concatenate([np.arange(n) for n in lengths])
    assert batch.position_ids.tolist() == expected_positions.tolist()

    # Labels first, spare slots after them; each position once.
    n = batch.num_masked
    positions = batch.masked_positions.tolist()
    labels = batch.masked_labels.tolist()
    assert IGNORE not in labels[:n]
    assert labels[n:] == [IGNORE] * (M - n)
    assert positions[n:] == [0] * (M - n)
    assert positions[:n] == sorted(set(positions[:n]))
    assert all(label >= FIRST for label in labels[:n]), "a special token was masked"

    original = batch.input_ids.clone()
    original[batch.masked_positions[:n]] = batch.masked_labels[:n]
    assert SPECIAL.mask not in original.tolist()
    masked = np.zeros(T, dtype=int)
    masked[positions[:n]] = 1

    found, real = [], 0
    for start, end, label in zip(bounds[:-1], bounds[1:], batch.nsp_labels.tolist(), strict=True):
        ids, types = original[start:end].tolist(), batch.token_type_ids[start:end].tolist()
        if start >= batch.num_tokens:  # slack, or empty
            assert label == IGNORE
            assert set(ids) <= {SPECIAL.pad}
            assert set(types) <= {0}
            assert masked[start:end].sum() == 0
            continue
        assert end > start, "an empty segment before a real one"
        real += end - start
        assert ids[0] == SPECIAL.cls
        assert ids[-1] == SPECIAL.sep
        assert SPECIAL.pad not in ids
        assert SPECIAL.cls not in ids[1:]
        b = ids[types.index(1) :] if 1 in types else []
        a = ids[: len(ids) - len(b)]
        assert types == [0] * len(a) + [1] * len(b)
        assert a[-1] == SPECIAL.sep
        assert len(a) > 2, "A is empty"
        assert len(b) != 1, "B is empty"
        assert b or label == IGNORE
        found.append(Segment(a[1:-1], b[:-1], label, int(masked[start:end].sum())))
    assert real == batch.num_tokens
    assert batch.num_pairs == sum(s.label != IGNORE for s in found)
    return found
