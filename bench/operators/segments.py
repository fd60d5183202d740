"""The segments of attention's cases: their lengths, and their tensors packed end to end or padded to the longest.

Lengths "real" follow the sentence pairs that `fusebert.train` makes of 2.3 M tokens of Python documentation strings
(``fusebert prepare --corpus pydocs --max-bytes 8MB --vocab-size 8192``) at seqlen 128 and 512. A pair is filled up to
seqlen as far as its text goes: most are long, a quarter is short. Other longest lengths scale the nearer table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..measure.case import Cost
from .build import Setting

T = TypeVar("T")
CHOICES = ("equal", "real", "half")
# Quantiles 0, 0.05 … 1 of 19,970 and 4,469 pairs.
QUANTILES = {
    128: (3, 30, 46, 59, 71, 81, 89, 96, 101, 106, 109, 112, 115, 118, 120, 122, 124, 126, 128, 128, 128),
    512: (7, 40, 65, 104, 150, 203, 264, 332, 388, 433, 456, 471, 481, 488, 493, 498, 501, 504, 507, 510, 512),
}
# The reference holds the float64 scores [chunk, H, n, n] of a chunk of segments at a time: at most so many elements.
CHUNK_ELEMENTS = 1 << 27


def segment_lengths(kind: str, tokens: int, longest: int) -> list[int]:
    """Lengths that sum to ``tokens``; if they are equal, ``tokens`` rounded down to whole segments.

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
    quantiles = np.array((0, longest) if kind == "half" else QUANTILES[128 if longest <= 128 else 512], dtype=float)
    quantiles *= longest / quantiles[-1]
    mean = (quantiles[1:] + quantiles[:-1]).mean() / 2
    count = max(1, round(tokens / mean) - 1)
    # The middles of `count` equal shares of the distribution, so that the lengths do not depend on a seed.
    shares = (np.arange(count) + 0.5) / count
    drawn = np.interp(shares, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).clip(1, longest)
    lengths, left = [longest], tokens - longest
    order = itertools.cycle(np.random.default_rng(0).permutation(drawn).tolist())
    while left > 0:
        lengths.append(min(next(order), left))
        left -= lengths[-1]
    return lengths


class Segments(Setting):
    """A setting of attention: B segments of at most N tokens, T in all, and the index tensors that go with them."""

    @cached_property
    def lengths(self) -> list[int]:
        longest, tokens = self.sizes("N", "T")
        return segment_lengths(str(self.shape["lengths"]), tokens, longest)

    @property
    def heads(self) -> int:
        return int(self.shape["H"])

    @property
    def head_dim(self) -> int:
        return int(self.shape["D"])

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return int(self.shape["N"])

    @property
    def equal(self) -> bool:
        """Whether all have one length."""
        return min(self.lengths) == self.longest

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1]."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(self.device)

    @cached_property
    def real(self) -> Tensor:
        """bool [B, N], True on tokens, False on padding."""
        return torch.arange(self.longest, device=self.device) < self.cu_seqlens.diff()[:, None]

    @cached_property
    def _made(self) -> dict[Callable[[Segments], Any], Any]:
        return {}

    def once(self, make: Callable[[Segments], T]) -> T:
        """``make(self)``, made once for this object."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[no-any-return]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of consecutive segments of one length, as many as the reference may hold."""
        first = 0
        while first < len(self.lengths):
            n = self.lengths[first]
            most = max(1, CHUNK_ELEMENTS // (self.heads * n * n))
            last = first
            while last < len(self.lengths) and last - first < most and self.lengths[last] == n:
                last += 1
            yield first, last
            first = last

    def head_chunks(self, n: int) -> Iterator[slice]:
        """Slices of the heads, for segments of length ``n`` that are too long for the reference with all heads."""
        most = max(1, min(self.heads, CHUNK_ELEMENTS // (n * n)))
        for first in range(0, self.heads, most):
            yield slice(first, first + most)

    def cost(self, products: int, tensors: int) -> Cost:
        """Of ``products`` matrix products over all pairs of a segment's tokens, and ``tensors`` tensors [T, H, D]."""
        pairs = self.heads * sum(n * n for n in self.lengths)
        size = self.tokens * self.heads * self.head_dim * self.dtype.itemsize
        return Cost(2 * products * self.head_dim * pairs, tensors * size)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H, D] → [B, H, N, D] over memory that is [B, N, H, D], zeros on padding."""
        padded = packed.new_zeros(len(self.lengths), self.longest, self.heads, self.head_dim)
        padded[self.real] = packed
        return padded.transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, H, N, D] → [T, H, D], the real rows."""
        return padded.transpose(1, 2)[self.real]
