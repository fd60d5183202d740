"""The constant shape of a run's batches."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np

from .examples import MIN_SEQLEN

Count = TypeVar("Count", int, np.ndarray)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The sizes that all batches of a run share. `fit_shape` finds S and M for a text.

    Attributes:
        tokens: T, a multiple of 8, at least ``seqlen``.
        segments: S, the most segments of a batch, those of the slack included; at least T / seqlen.
        masked: M, the most masked tokens of a batch; a multiple of 8.
        seqlen: the longest segment, [CLS] and [SEP]s included; at least 5.

    Raises:
        ValueError: a field is out of range.
    """

    tokens: int
    segments: int
    masked: int
    seqlen: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer; got {value!r}")
        if self.seqlen < MIN_SEQLEN:
            raise ValueError(f"seqlen must be at least {MIN_SEQLEN}, for [CLS] a [SEP] b [SEP]; got {self.seqlen}")
        if self.tokens < self.seqlen:
            raise ValueError(f"tokens must be at least seqlen, {self.seqlen}, to hold an example; got {self.tokens}")
        for name in ("tokens", "masked"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8, for the matrix units; got {getattr(self, name)}")
        least = self.slack_segments(0)
        if self.segments < least:
            raise ValueError(f"segments must be at least tokens / seqlen, {least}; got {self.segments}: use fit_shape")

    def slack_segments(self, used: Count) -> Count:
        """The number of segments that the slack of a batch with ``used`` tokens is cut into."""
        return -(-(self.tokens - used) // self.seqlen)
