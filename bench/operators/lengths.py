"""Segment lengths for attention's cases: all equal, as real text has them, or spread so that half is padding.

"real" follows the lengths of sentence pairs that `fusebert.train` makes of 2.3 M tokens of Python documentation
strings (``fusebert prepare --corpus pydocs --max-bytes 8MB --vocab-size 8192``) at seqlen 128 and 512. A pair is filled
up to seqlen as far as its text goes: most are long, a quarter is short. Other longest lengths scale the nearer table.
"""

from __future__ import annotations

import itertools

import numpy as np

CHOICES = ("equal", "real", "half")
# Quantiles 0, 0.05 … 1 of 19,970 and 4,469 pairs.
_QUANTILES = {
    128: (3, 30, 46, 59, 71, 81, 89, 96, 101, 106, 109, 112, 115, 118, 120, 122, 124, 126, 128, 128, 128),
    512: (7, 40, 65, 104, 150, 203, 264, 332, 388, 433, 456, 471, 481, 488, 493, 498, 501, 504, 507, 510, 512),
}


def segment_lengths(kind: str, tokens: int, longest: int) -> list[int]:
    """Lengths that add up to ``tokens``, to ``tokens`` rounded down to whole segments where they are equal.

    Args:
        kind: "equal"; "real", see above; "half": 1 … ``longest`` in equal steps: a padded batch is half padding.
        longest: of a segment, at most ``tokens``. At least one segment has it.

    Raises:
        ValueError: ``longest`` is above ``tokens``, or there is no such kind.
    """
    if kind not in CHOICES:
        raise ValueError(f"lengths={kind}: choose one of {', '.join(CHOICES)}")
    if longest > tokens:
        raise ValueError(f"N={longest} must be at most T={tokens}: a segment has to fit")
    if kind == "equal":
        return [longest] * (tokens // longest)
    quantiles = np.array((0, longest) if kind == "half" else _QUANTILES[128 if longest <= 128 else 512], dtype=float)
    quantiles *= longest / quantiles[-1]
    mean = (quantiles[1:] + quantiles[:-1]).mean() / 2
    count = max(1, round(tokens / mean) - 1)
    # One from the middle of each of `count` equal shares of the distribution: no luck is involved.
    shares = (np.arange(count) + 0.5) / count
    drawn = np.interp(shares, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).clip(1, longest)
    lengths, left = [longest], tokens - longest
    order = itertools.cycle(np.random.default_rng(0).permutation(drawn).tolist())
    while left > 0:
        lengths.append(min(next(order), left))
        left -= lengths[-1]
    return lengths


__all__ = ["CHOICES", "segment_lengths"]
