"""BERT's special tokens, and the largest vocabulary."""

from __future__ import annotations

from typing import NamedTuple

# Far above any in use (500,000), and small enough for tables with an entry for each token.
MAX_VOCAB_SIZE = 1 << 22
UNKNOWN = "[UNK]"
SPECIAL_TOKENS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")


class SpecialTokens(NamedTuple):
    """The ids of `SPECIAL_TOKENS`, in that order."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
