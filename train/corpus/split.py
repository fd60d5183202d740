"""Which documents are held out: a part of the text of the size that was asked for, chosen by the documents' hashes.

A document's bin is the first `BIN_BITS` bits of its split hash, so copies share a bin, and the choice of bins does not
depend on the order of the documents. Up to a hundred thousand documents, nearly every bin has one.
"""

from __future__ import annotations

import numpy as np

BIN_BITS = 20
_FULL = 0.98  # of the size asked for: enough
_TOLERANCE = 1.05  # of the size asked for: not too much
_STEPS = 1000  # the size asked for, in the units of `_nearest_subset`


def bin_of(split_hash: np.ndarray) -> np.ndarray:
    """int64 [n]: the bins of documents with the given uint64 hashes."""
    return (split_hash >> np.uint64(64 - BIN_BITS)).astype(np.int64)


def choose_heldout(sizes: np.ndarray, share: float) -> np.ndarray:
    """bool [bins]: the bins that are held out, as near to ``share`` of the text as their sizes allow.

    At least one bin with text is held out, and at least one is not; with fewer than two, none is held out.

    Args:
        sizes: int64 [bins]: bytes of text in each bin.
        share: in (0, 1).
    """
    heldout = np.zeros(len(sizes), dtype=bool)
    filled, total = np.flatnonzero(sizes), int(sizes.sum())
    if len(filled) < 2:
        return heldout
    wanted = share * total
    most = min(_TOLERANCE * wanted, total - 1)
    chosen = _in_order(sizes, filled, 0, wanted, most)
    if not 0.9 * wanted <= sizes[chosen].sum() <= 1.1 * wanted:
        small = filled[sizes[filled] <= 0.02 * wanted]
        large = filled[sizes[filled] > 0.02 * wanted]
        chosen = _nearest_subset(sizes, large, wanted, int(sizes[small].sum()))
        chosen += _in_order(sizes, small, int(sizes[chosen].sum()), wanted, most)
    if not chosen:
        chosen = [int(filled[sizes[filled].argmin()])]
    elif len(chosen) == len(filled):
        chosen.pop()
    heldout[chosen] = True
    return heldout


def _in_order(sizes: np.ndarray, bins: np.ndarray, size: int, wanted: float, most: float) -> list[int]:
    """The first bins that fit, until the sum of their sizes and ``size`` is ``wanted``."""
    chosen = []
    for each, weight in zip(bins.tolist(), sizes[bins].tolist(), strict=True):
        if size >= _FULL * wanted:
            break
        if size + weight <= most:
            chosen.append(each)
            size += weight
    return chosen


def _nearest_subset(sizes: np.ndarray, bins: np.ndarray, wanted: float, filling: int) -> list[int]:
    """The bins with a sum of sizes that ``filling``, in small pieces, brings nearest to ``wanted``.

    Dynamic programming over the sums, up to 2·wanted: bit s of an integer says whether the sum s is reached.
    """
    unit = wanted / _STEPS
    weights = np.maximum(np.rint(sizes[bins] / unit), 1).astype(np.int64).tolist()
    mask, reached, before = (1 << 2 * _STEPS + 1) - 1, 1, []
    for weight in weights:
        before.append(reached)
        if weight <= 2 * _STEPS:
            reached |= reached << weight & mask
    sums = [s for s in range(2 * _STEPS + 1) if reached >> s & 1]
    best = min(sums, key=lambda s: (max(_STEPS - s - filling / unit, s - _STEPS, 0), -s))
    chosen = []
    for each, weight, earlier in zip(bins[::-1].tolist(), weights[::-1], before[::-1], strict=True):
        if not earlier >> best & 1:
            chosen.append(each)
            best -= weight
    return chosen
