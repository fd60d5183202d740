"""BERT's special tokens."""

from __future__ import annotations

from typing import NamedTuple

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class SpecialTokens(NamedTuple):
    """The ids of `SPECIAL_TOKENS`, in that order."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
