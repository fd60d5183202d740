"""Dynamic masking (Devlin et al. 2018; masks drawn anew in each epoch, as in Liu et al. 2019) of many examples at once.

Of the n ordinary (not special) tokens of an example, max(1, round(0.15 n)) are chosen. Each is replaced, independently:
80 % become [MASK], 10 % a random token, 10 % stay. With whole words, words are tried in random order and taken whole
while they fit into that number, which is then an upper bound, and 0 when every word is longer.
"""

from __future__ import annotations

import numpy as np

from .passages import ranges

MLM_PROBABILITY = 0.15


def num_to_mask(tokens: np.ndarray, probability: float) -> np.ndarray:
    """int64 [E]: the number of masked tokens of examples with ``tokens`` (int64 [E]) ordinary tokens."""
    return np.where(tokens > 0, np.maximum(1, np.rint(tokens * probability)), 0).astype(np.int64)


class Masker:
    """Chooses and replaces the tokens to predict.

    Args:
        special: ids that are never chosen and never used as random tokens.
        mask: the id of [MASK].
        vocab_size: V.
        probability: share of the ordinary tokens to predict.
        continues_word: bool [V], True for "##" pieces: mask whole words; None: mask single tokens.

    Attributes:
        maskable: bool [V], the ids of ordinary tokens.
    """

    def __init__(
        self,
        special: tuple[int, ...],
        mask: int,
        vocab_size: int,
        probability: float,
        continues_word: np.ndarray | None = None,
    ) -> None:
        self.maskable = np.ones(vocab_size, dtype=bool)
        self.maskable[list(special)] = False
        self._mask = mask
        self._replacements = np.flatnonzero(self.maskable)
        self._probability = probability
        self._continues_word = continues_word

    def __call__(
        self, input_ids: np.ndarray, segment: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks ``input_ids`` in place.

        Args:
            input_ids: int64 [n], segments end to end.
            segment: int64 [n], the segment of each token, not decreasing.
            rng: decides.

        Returns:
            The chosen positions, increasing, and the original ids there: int64 [m] both.
        """
        candidates = np.flatnonzero(self.maskable[input_ids])
        segment = segment[candidates]
        wanted = num_to_mask(np.bincount(segment), self._probability)
        if self._continues_word is None:
            chosen = _smallest(segment, wanted, rng)
        else:
            chosen = _whole_words(candidates, segment, self._continues_word[input_ids[candidates]], wanted, rng)
        positions = candidates[chosen]
        labels = input_ids[positions]
        action = rng.random(len(positions))
        input_ids[positions[action < 0.8]] = self._mask
        replaced = positions[(action >= 0.8) & (action < 0.9)]
        input_ids[replaced] = self._replacements[rng.integers(len(self._replacements), size=len(replaced))]
        return positions, labels


def _shuffled(segment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The indices of ``segment`` (int64 [n], not decreasing) in random order within each segment.

    Sorts integers that hold segment, random bits and index, which is several times as fast as an argsort.
    """
    if not len(segment):
        return segment
    index_bits, segment_bits = (max(1, int(largest).bit_length()) for largest in (len(segment), segment[-1]))
    random_bits = 63 - index_bits - segment_bits
    random = rng.integers(1 << random_bits, size=len(segment))
    keys = (((segment << random_bits) | random) << index_bits) | np.arange(len(segment))
    keys.sort()
    return keys & ((1 << index_bits) - 1)


def _smallest(segment: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``wanted[s]`` random indices of each segment s, all in increasing order."""
    count = np.bincount(segment, minlength=len(wanted))
    chosen = _shuffled(segment, rng)[ranges(np.cumsum(count) - count, wanted)]
    chosen.sort()
    return chosen


def _whole_words(
    candidates: np.ndarray, segment: np.ndarray, continues: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Indices, increasing, of whole words with at most ``wanted[s]`` tokens of each segment s together."""
    # A piece after a gap (a special token) begins a word.
    heads = ~continues
    heads[1:] |= (np.diff(candidates) > 1) | (np.diff(segment) > 0)
    heads[:1] = True
    first = np.flatnonzero(heads)
    size = np.diff(np.append(first, len(heads)))
    order = _shuffled(segment[first], rng)
    count = np.bincount(segment[first], minlength=len(wanted))
    end = np.cumsum(count)

    # Each round tries the next word of every segment; a word that does not fit is skipped.
    taken = np.zeros(len(first), dtype=bool)
    room = wanted.copy()
    turn = end - count
    active = np.flatnonzero((room > 0) & (turn < end))
    while len(active):
        word = order[turn[active]]
        fits = size[word] <= room[active]
        taken[word[fits]] = True
        room[active[fits]] -= size[word[fits]]
        turn[active] += 1
        active = active[(room[active] > 0) & (turn[active] < end[active])]
    return ranges(first[taken], size[taken])
