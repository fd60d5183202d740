"""Special tokens by what they are for, and the bounds of a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Far above any in use (500,000), and small enough for tables with an entry for each token.
MAX_VOCAB_SIZE = 1 << 22
SMALLEST_SUBWORDS = 512  # of bpe and unigram: 256 bytes, the special tokens, and room to learn something
UNKNOWN = "[UNK]"
SPECIAL_TOKENS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")  # of the vocabularies that are learned here
# The names of each role: BERT's, then RoBERTa's, which most vocabularies of SentencePiece have too.
NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": (UNKNOWN, "<unk>"),
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
}


class SpecialTokens(NamedTuple):
    """The ids of the special tokens, by role."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_names(vocab: Mapping[str, int]) -> dict[str, str]:
    """The token of each role, in the order of `SpecialTokens`.

    Args:
        vocab: token → id, with the special tokens.

    Raises:
        ValueError: a role has no token. The message lists the names that are known.
    """
    found = {role: next((name for name in names if vocab.get(name) is not None), None) for role, names in NAMES.items()}
    missing = [NAMES[role] for role, name in found.items() if name is None]
    if missing:
        others = ", ".join(name for names in missing for name in names[1:])
        raise ValueError(f"lacks the special tokens {', '.join(names[0] for names in missing)} (or {others})")
    return {role: name for role, name in found.items() if name is not None}


def special_ids(vocab: Mapping[str, int]) -> SpecialTokens:
    """The id of each role's token.

    Raises:
        ValueError: as `special_names`.
    """
    return SpecialTokens(**{role: vocab[name] for role, name in special_names(vocab).items()})
