"""Random pretraining batches with BERT's statistics, for timing without a corpus.

Lengths: equal, or ragged: exp(normal(log(0.45 N), 0.6)), clipped to [8, N], about half of N on average, with the
longest at N, as sentence pairs that are cut at N. Tokens: Zipf's law, p ∝ 1 / (rank + 2.7), and every other token is a
function of the one before it, so that a model can learn. Masking as in training (`train.batches.masking`).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ...model.batch import IGNORE, PackedBatch
from ...train.batches.masking import MLM_PROBABILITY, Masker, num_to_mask

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
    lengths = [seqlen]  # a batch of real text has a segment of the full length
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
    # [CLS] and two [SEP] of each segment are never masked.
    masked = max(int(num_to_mask(np.array(lengths) - 3, MLM_PROBABILITY).sum()) for lengths in all_lengths)
    return [_batch(rng, vocab_size, tokens, seqlen, lengths, slots, masked) for lengths in all_lengths]


def _batch(
    rng: np.random.Generator, vocab_size: int, tokens: int, seqlen: int, lengths: list[int], slots: int, masked: int
) -> PackedBatch:
    num_tokens = sum(lengths)
    bounds = np.full(slots + 1, tokens, dtype=np.int32)  # the end of the slack and of the unused segments
    bounds[: len(lengths) + 1] = np.concatenate([[0], np.cumsum(lengths)])

    ids = _zipf(rng, vocab_size, tokens)
    ordinary = vocab_size - FIRST_ORDINARY
    ids[1::2] = FIRST_ORDINARY + (7 * (ids[0 : 2 * (tokens // 2) : 2] - FIRST_ORDINARY) + 1) % ordinary
    types = np.zeros(tokens, dtype=np.int64)
    positions = np.zeros(tokens, dtype=np.int64)
    for start, length in zip(bounds, lengths, strict=False):
        half = start + 1 + (length - 3) // 2  # [CLS] A [SEP] B [SEP]
        ids[[start, half, start + length - 1]] = CLS, SEP, SEP
        types[half + 1 : start + length] = 1
        positions[start : start + length] = np.arange(length)
    ids[num_tokens:] = PAD
    positions[num_tokens:] = np.arange(tokens - num_tokens)

    mask = Masker((PAD, CLS, SEP, MASK), MASK, vocab_size, MLM_PROBABILITY)
    rows, labels = mask(ids[:num_tokens], np.repeat(np.arange(len(lengths)), lengths), rng)  # changes ids
    masked_positions = np.zeros(masked, dtype=np.int64)
    masked_labels = np.full(masked, IGNORE, dtype=np.int64)
    masked_positions[: len(rows)], masked_labels[: len(rows)] = rows, labels

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
