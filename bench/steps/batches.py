"""Random pretraining batches with BERT's statistics, for timing where there is no corpus.

Lengths: equal, or ragged: exp(normal(log(0.45 N), 0.6)), clipped to [8, N], about half of N on average, with the
longest at N, which is what sentence pairs cut at N look like. Tokens: Zipf's law, p ∝ 1 / (rank + 2.7), and every other
token is a function of the one before, so that there is something to learn. Masking as in Devlin et al. 2018: 15 % of
each sequence's ordinary tokens are predicted, of these 80 % become [MASK], 10 % a random token, 10 % stay.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ...model.batch import IGNORE, PackedBatch
from ...train.batches.masking import MLM_PROBABILITY, corrupt, num_to_mask

PAD, CLS, SEP, MASK, FIRST_ORDINARY = 0, 1, 2, 3, 4
SHORTEST = 8


def draw_lengths(rng: np.random.Generator, tokens: int, seqlen: int, *, ragged: bool) -> list[int]:
    """Segment lengths, at most ``seqlen``, that fill ``tokens`` but for fewer than 8.

    Raises:
        ValueError: ``seqlen`` is below 8 or above ``tokens``.
    """
    if not SHORTEST <= seqlen <= tokens:
        raise ValueError(f"seqlen must be in [{SHORTEST}, tokens = {tokens}]; got {seqlen}")
    if not ragged:
        return [seqlen] * (tokens // seqlen)
    lengths = [seqlen]  # one at the longest, as in any batch this large
    left = tokens - seqlen
    while left >= SHORTEST:
        drawn = round(rng.lognormal(math.log(0.45 * seqlen), 0.6))
        lengths.append(min(max(drawn, SHORTEST), seqlen, left))
        left -= lengths[-1]
    rng.shuffle(lengths)
    return lengths


def _zipf(rng: np.random.Generator, vocab_size: int, n: int) -> np.ndarray:
    weights = 1.0 / (np.arange(vocab_size - FIRST_ORDINARY) + 2.7)
    return FIRST_ORDINARY + rng.choice(len(weights), size=n, p=weights / weights.sum())


def _masked_counts(lengths: list[int]) -> np.ndarray:
    """int64: the number of masked tokens of each segment; [CLS] and two [SEP] are not candidates."""
    return num_to_mask(np.array(lengths) - 3, MLM_PROBABILITY)


def random_batches(
    vocab_size: int, tokens: int, seqlen: int, count: int, *, ragged: bool = False, seed: int = 0
) -> list[PackedBatch]:
    """``count`` batches of one shape on the CPU: T = ``tokens``, the same S and M in all.

    Args:
        vocab_size: above 8; ids 0 to 3 are [PAD], [CLS], [SEP] and [MASK].
        ragged: lengths vary up to ``seqlen``, else all are ``seqlen``.

    Raises:
        ValueError: ``vocab_size`` or ``seqlen`` is out of range.
    """
    if vocab_size <= 2 * FIRST_ORDINARY:
        raise ValueError(f"vocab_size must be above {2 * FIRST_ORDINARY}; got {vocab_size}")
    rng = np.random.default_rng(seed)
    all_lengths = [draw_lengths(rng, tokens, seqlen, ragged=ragged) for _ in range(count)]
    slots = max(len(lengths) for lengths in all_lengths) + 1  # one for the slack
    masked = max(int(_masked_counts(lengths).sum()) for lengths in all_lengths)
    return [_batch(rng, vocab_size, tokens, seqlen, lengths, slots, masked) for lengths in all_lengths]


def _batch(
    rng: np.random.Generator, vocab_size: int, tokens: int, seqlen: int, lengths: list[int], slots: int, masked: int
) -> PackedBatch:
    num_tokens = sum(lengths)
    bounds = np.full(slots + 1, tokens, dtype=np.int32)  # the slack's end, and segments that do not exist
    bounds[: len(lengths) + 1] = np.concatenate([[0], np.cumsum(lengths)])

    ids = _zipf(rng, vocab_size, tokens)
    ordinary = vocab_size - FIRST_ORDINARY
    ids[1::2] = FIRST_ORDINARY + (7 * (ids[0 : 2 * (tokens // 2) : 2] - FIRST_ORDINARY) + 1) % ordinary
    types = np.zeros(tokens, dtype=np.int64)
    positions = np.zeros(tokens, dtype=np.int64)
    chosen = []
    for start, length, count in zip(bounds, lengths, _masked_counts(lengths), strict=False):
        half = start + 1 + (length - 3) // 2  # [CLS] A [SEP] B [SEP]
        ids[[start, half, start + length - 1]] = CLS, SEP, SEP
        types[half + 1 : start + length] = 1
        positions[start : start + length] = np.arange(length)
        candidates = np.concatenate([np.arange(start + 1, half), np.arange(half + 1, start + length - 1)])
        chosen.append(np.sort(rng.permutation(candidates)[:count]))
    ids[num_tokens:] = PAD
    positions[num_tokens:] = np.arange(tokens - num_tokens)

    rows = np.concatenate(chosen)
    masked_positions = np.zeros(masked, dtype=np.int64)
    masked_labels = np.full(masked, IGNORE, dtype=np.int64)
    masked_positions[: len(rows)], masked_labels[: len(rows)] = rows, ids[rows]
    corrupt(ids, rows, MASK, np.arange(FIRST_ORDINARY, vocab_size), rng)

    nsp_labels = np.full(slots, IGNORE, dtype=np.int64)
    nsp_labels[: len(lengths)] = rng.integers(0, 2, len(lengths))
    return PackedBatch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        token_type_ids=torch.from_numpy(types),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds),
        masked_positions=torch.from_numpy(masked_positions),
        masked_labels=torch.from_numpy(masked_labels),
        nsp_labels=torch.from_numpy(nsp_labels),
        max_seqlen=seqlen,
        num_tokens=num_tokens,
        num_masked=len(rows),
        num_pairs=len(lengths),
    )


__all__ = ["draw_lengths", "random_batches"]
