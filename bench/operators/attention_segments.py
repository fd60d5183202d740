"""What attention is benchmarked on: segments packed end to end, or padded to the longest where a peer wants that."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..measure.case import Cost

GRADIENTS = ("dq", "dk", "dv")
# The reference holds scores of a chunk of segments at a time: float64 [chunk, H, n, n] of at most so many elements.
CHUNK_ELEMENTS = 1 << 27


class Segments:
    """Segment lengths and heads, and the index tensors that go with them."""

    def __init__(self, lengths: list[int], heads: int, head_dim: int, device: torch.device) -> None:
        self.lengths, self.heads, self.head_dim, self.device = lengths, heads, head_dim, device
        self.tokens, self.longest = sum(lengths), max(lengths)
        self.equal = min(lengths) == self.longest
        self.cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
        columns = torch.arange(self.longest, device=device)
        self.real = columns < torch.tensor(lengths, device=device)[:, None]  # (B, N)

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
        """Slices of the heads, for segments of which even one is too long to hold with all its heads."""
        most = max(1, min(self.heads, CHUNK_ELEMENTS // (n * n)))
        for first in range(0, self.heads, most):
            yield slice(first, first + most)

    def cost(self, forward: bool, backward: bool, element_size: int) -> Cost:
        squares = sum(n * n for n in self.lengths)
        flops = (4 * forward + 10 * backward) * self.head_dim * self.heads * squares
        return Cost(flops, (4 * forward + 7 * backward) * self.tokens * self.heads * self.head_dim * element_size)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H, D] → [B, H, N, D] over memory that is [B, N, H, D], zeros on padding."""
        padded = packed.new_zeros(len(self.lengths), self.longest, self.heads, self.head_dim)
        padded[self.real] = packed
        return padded.transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, H, N, D] → [T, H, D], the real rows."""
        return padded.transpose(1, 2)[self.real]


__all__ = ["GRADIENTS", "Segments"]
