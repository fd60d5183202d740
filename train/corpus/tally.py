"""What a corpus holds, counted while it is written: lengths, [UNK], characters without a token, sample lines."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..text.tokenizer import has_token
from .encode import Block
from .format import SPLITS

TOP = 10  # characters without a token that are listed
SAMPLES = 3  # lines that are shown
SAMPLE_TOKENS = 24  # of each line


class Tally:
    """Counts of the blocks of one split.

    Args:
        unk: id of [UNK].
    """

    def __init__(self, unk: int) -> None:
        self._unk = unk
        self.documents = self.sentences = self.tokens = self.unknown_tokens = self.long_words = 0
        self.unknown: collections.Counter[str] = collections.Counter()
        self._lengths = np.zeros(0, dtype=np.int64)  # [l]: how many documents have l tokens
        self._samples: list[list[int]] = []

    def add(self, block: Block) -> None:
        """Counts a block. Documents and sentences without a token do not count."""
        ends = np.concatenate(([0], np.cumsum(block.sentence_lengths, dtype=np.int64)))
        lengths = np.diff(ends[np.concatenate(([0], np.cumsum(block.document_lengths, dtype=np.int64)))])
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return
        counts = np.bincount(lengths, minlength=len(self._lengths))
        counts[: len(self._lengths)] += self._lengths
        self._lengths = counts
        self.documents += len(lengths)
        self.sentences += int(np.count_nonzero(block.sentence_lengths))
        self.tokens += len(block.tokens)
        self.unknown_tokens += int(np.count_nonzero(block.tokens == self._unk))
        self.unknown.update(block.unknown)
        self.long_words += block.long_words
        self._sample(block, ends)

    def _sample(self, block: Block, ends: np.ndarray) -> None:
        """Keeps the first sentence, one of the middle of the first block, and one of the newest block."""
        filled = np.flatnonzero(np.diff(ends))
        middle = len(filled) // 2
        for place in sorted({0, middle, len(filled) - 1}) if not self._samples else [middle]:
            at = filled[place]
            self._samples = self._samples[: SAMPLES - 1]
            self._samples.append(block.tokens[ends[at] : ends[at + 1]][:SAMPLE_TOKENS].tolist())

    @property
    def unknown_share(self) -> float:
        """The share of [UNK] among the tokens."""
        return self.unknown_tokens / max(self.tokens, 1)

    def median_length(self) -> float:
        """The median length of the documents in tokens."""
        ranks = np.cumsum(self._lengths)
        low, high = np.searchsorted(ranks, [(self.documents - 1) // 2, self.documents // 2], side="right")
        return float(low + high) / 2

    def describe(self, tokenizer: Tokenizer, copies: int) -> dict[str, Any]:
        """The counts as JSON.

        Args:
            tokenizer: that made the tokens.
            copies: documents with the text of an earlier one.
        """
        return {
            "documents": self.documents,
            "sentences": self.sentences,
            "tokens": self.tokens,
            "mean_document_tokens": round(self.tokens / max(self.documents, 1), 1),
            "median_document_tokens": self.median_length(),
            "unknown_share": self.unknown_share,
            "characters_without_token": without_token(self.unknown, tokenizer),
            "duplicate_documents": copies,
            "duplicate_share": copies / max(self.documents, 1),
            "sample_lines": [[tokenizer.id_to_token(i) for i in ids] for ids in self._samples],
        }


def without_token(characters: collections.Counter[str], tokenizer: Tokenizer) -> dict[str, int]:
    """The most frequent of ``characters`` that have no token, with their counts."""
    by_count = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    found: dict[str, int] = {}
    for character, count in by_count:
        if len(found) == TOP:
            break
        if not has_token(character, tokenizer):
            found[character] = count
    return found


def tallies(unk: int) -> dict[str, Tally]:
    """An empty tally for each split."""
    return {split: Tally(unk) for split in SPLITS}
