"""Passages: pieces of documents, small enough to be shuffled and read in random order.

A document of up to `max_tokens` tokens is one passage. A longer one is cut into equal pieces at the nearest sentence
borders, so that a book is shuffled as finely as a web page and no chunk is as large as a book. `Passages` lists them
(8 bytes each); `Passages.read` copies any of them from the memory maps into one `Text`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ..corpus.reader import Split


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers starts[0] … starts[0] + lengths[0] − 1, starts[1] …, as one int64 array of length sum(lengths)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - ends + lengths, lengths)


@dataclasses.dataclass
class Text:
    """Passages copied end to end.

    Attributes:
        tokens: uint16 or uint32 [n].
        starts, ends: int64 [P], passage p is tokens[starts[p] : ends[p]]; the next passage or a separator follows.
        borders: int64, increasing: 0 and every offset where a sentence or a passage ends.
        documents: int64 [P], the number of each passage's document in the split.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    borders: np.ndarray
    documents: np.ndarray


class Passages:
    """Every passage of a split, numbered in the order of the corpus.

    Args:
        split: of a `Corpus`.
        max_tokens: a longer document is cut into equal pieces of at most this, each cut moved to the next sentence
            border (a sentence as long as a piece is cut inside).

    Attributes:
        tokens: int32 [P], the length of each passage before the cuts are moved.
        weights: float32 [P], how often an epoch has each passage; None: once.
        num_tokens: tokens in the split.
        num_documents: documents in the split.

    Raises:
        ValueError: the split has no text.
    """

    def __init__(self, split: Split, max_tokens: int) -> None:
        self._shards = split.shards
        lengths, counts = [], []
        for shard in self._shards:
            lengths.append(np.diff(shard.sentences[shard.documents]))
            counts.append(len(lengths[-1]))
        weights = [shard.weight for shard in self._shards]
        length = np.concatenate([np.zeros(0, dtype=np.int64), *lengths])
        pieces = -(-length // max_tokens)
        self._first_document = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # of each shard, then the end
        self._document = np.repeat(np.arange(len(length), dtype=np.int32), pieces)
        self.tokens = np.repeat((length // np.maximum(pieces, 1)).astype(np.int32), pieces)
        self.weights = None
        if any(weight != 1.0 for weight in weights):
            self.weights = np.repeat(np.repeat(np.array(weights, dtype=np.float32), counts), pieces)
        self.num_tokens = int(length.sum())
        self.num_documents = int(np.count_nonzero(length))
        if self.num_tokens == 0:
            raise ValueError(f"the split {split.name!r} has no text")

    def __len__(self) -> int:
        return len(self._document)

    def tokens_of_epoch(self) -> float:
        """Tokens that an epoch has of the split, weights counted."""
        return float(self.num_tokens if self.weights is None else (self.weights * self.tokens).sum(dtype=np.float64))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """int32 [n]: the passages of an epoch in random order, each as often as its weight says, on average."""
        count = len(self)
        if self.weights is None:
            return rng.permutation(count).astype(np.int32)
        whole = np.floor(self.weights)
        times = (whole + (rng.random(count) < self.weights - whole)).astype(np.int64)
        return rng.permutation(np.repeat(np.arange(count, dtype=np.int32), times))

    def sample(self, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Numbers of passages drawn at random without repetition, of about ``tokens`` tokens, or all passages."""
        share = min(1.0, tokens / self.num_tokens)
        return rng.choice(len(self), size=math.ceil(share * len(self)), replace=False)

    def read(self, passages: np.ndarray, separator: int | None = None) -> Text:
        """Copies the given passages.

        Args:
            passages: int64 [P], numbers of passages, in the order to copy them in.
            separator: a token id to put after each passage; None: nothing.
        """
        documents = self._document[passages].astype(np.int64)
        first = np.searchsorted(self._document, documents, side="left")
        pieces = np.searchsorted(self._document, documents, side="right") - first
        shard_of = np.searchsorted(self._first_document, documents, side="right") - 1

        start, end, first_border, num_borders = (np.zeros(len(passages), dtype=np.int64) for _ in range(4))
        touched = [(self._shards[s], np.flatnonzero(shard_of == s), self._first_document[s]) for s in set(shard_of)]
        for shard, *_ in touched:
            shard.check()
        for shard, rows, first_document in touched:
            local = documents[rows] - first_document
            bounds = shard.sentences[shard.documents[local]], shard.sentences[shard.documents[local + 1]]
            piece = passages[rows] - first[rows]
            start[rows] = _cuts(shard.sentences, *bounds, piece, pieces[rows])
            end[rows] = _cuts(shard.sentences, *bounds, piece + 1, pieces[rows])
            # Sentence ends strictly inside the passage; its own end is added below.
            first_border[rows] = np.searchsorted(shard.sentences, start[rows], side="right")
            num_borders[rows] = np.searchsorted(shard.sentences, end[rows], side="left") - first_border[rows]

        length = end - start
        stride = length + (separator is not None)
        out_start = np.cumsum(stride) - stride
        tokens = np.empty(int(stride.sum()), dtype=self._shards[0].tokens.dtype)
        out_border = 1 + np.cumsum(num_borders + 1) - (num_borders + 1)
        borders = np.zeros(1 + int(num_borders.sum()) + len(passages), dtype=np.int64)
        for shard, rows, _ in touched:
            tokens[ranges(out_start[rows], length[rows])] = shard.tokens[ranges(start[rows], length[rows])]
            inner = shard.sentences[ranges(first_border[rows], num_borders[rows])]
            borders[ranges(out_border[rows], num_borders[rows])] = inner + np.repeat(
                out_start[rows] - start[rows], num_borders[rows]
            )
        borders[out_border + num_borders] = out_start + length
        if separator is not None:
            tokens[out_start + length] = separator
        return Text(tokens, out_start, out_start + length, borders, documents)


def _cuts(sentences: np.ndarray, start: np.ndarray, end: np.ndarray, k: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """The start of piece k of each document [start, end): the first sentence border at or after k / pieces of its
    length, or that point itself when the border lies in the next piece. So no piece is empty."""
    even = start + (end - start) * k // pieces
    border = sentences[np.searchsorted(sentences, even, side="left")]
    return np.where(border < start + (end - start) * (k + 1) // pieces, border, even)
