"""Packed texts with labels: the input of `heads`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .batch import map_tensors


@dataclasses.dataclass
class TextBatch:
    """Texts end to end on one token axis, as in `PackedBatch`.

    Attributes:
        input_ids, token_type_ids, position_ids: int64 [T].
        cu_seqlens: int32 [S + 1], bounds of the segments. Texts come first, then the slack, then empty segments.
        labels: int64 [S], a class; −100 without one. Or float32 [S] (a number) or [S, C] (0 or 1 for each class); NaN
            without one. Or int64 [T], a class a token; −100 without one. Or int64 [S, 2], the first and the last token
            of an answer, counted from the segment's start; −100 without one.
        max_seqlen: upper bound of the segments' lengths.
        num_tokens: number of tokens, without the slack.
        num_labels: number of segments, or of tokens, with a label.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    max_seqlen: int
    num_tokens: int
    num_labels: int

    @property
    def label_counts(self) -> tuple[int, ...]:
        """The denominator of each loss."""
        return (self.num_labels,)

    def map(self, fn: Callable[[Tensor], Tensor]) -> TextBatch:
        """The batch with ``fn`` applied to each of its tensors."""
        return map_tensors(self, fn)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        """The batch with its tensors on ``device`` (``non_blocking`` as in ``Tensor.to``)."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))
