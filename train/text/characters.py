"""What the characters of a text say about it: its scripts, and whether its accents are part of the spelling."""

from __future__ import annotations

import collections
import functools
import unicodedata
from collections.abc import Iterable, Mapping

# Scripts in which marks may be left out, as BERT's uncased models do. "COMBINING" and "VARIATION" are marks of no
# script. In all others, removing marks makes other words: vowel signs, voiced kana, Hangul (jamo), й.
_OPTIONAL_MARKS = frozenset({"LATIN", "GREEK", "HEBREW", "COMBINING", "VARIATION"})
_NEEDED_SHARE = 1e-3  # of the letters: above it, the text is partly in a script that needs its marks
_DENSE_SHARE = 0.1  # of the Latin letters: above it, marks spell words (Vietnamese 0.25, French 0.04, English 0.0005)


def count_characters(texts: Iterable[str]) -> collections.Counter[str]:
    """How often each character occurs."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    return counts


@functools.lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """The first word of the character's Unicode name, which for letters is the script ("LATIN", "CJK", "THAI")."""
    return unicodedata.name(character, "UNKNOWN").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split(" ")[0]


@functools.lru_cache(maxsize=1 << 16)
def loses_marks(character: str) -> bool:
    """Whether stripping accents, as BERT does, changes the character: NFD without category Mn."""
    parts = unicodedata.normalize("NFD", character)
    return "".join(part for part in parts if unicodedata.category(part) != "Mn") != character


def is_ideograph(character: str) -> bool:
    """Whether BERT's tokenizer sets the character apart as a word: a CJK ideograph."""
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x2CEAF
        or 0x2F800 <= code <= 0x2FA1F
    )


def scripts(counts: Mapping[str, int]) -> dict[str, float]:
    """The share of the letters in each script, largest first. Scripts below 0.1 % are left out."""
    found: collections.Counter[str] = collections.Counter()
    for character, count in counts.items():
        if unicodedata.category(character)[0] == "L":
            found[script_of(character)] += count
    total = found.total()
    return {name: count / total for name, count in found.most_common() if count >= _NEEDED_SHARE * total}


def needs_marks(counts: Mapping[str, int]) -> bool:
    """Whether words of the text differ by accents and other marks alone, so that they must be kept.

    True when more than 0.1 % of the letters carry a mark in a script that spells with marks (Indic scripts, Thai,
    Hangul, kana, Arabic, Cyrillic, …), or when more than a tenth of the Latin letters carry one (Vietnamese).
    """
    letters = latin = needed = latin_marked = 0
    for character, count in counts.items():
        if unicodedata.category(character)[0] not in "LM":
            continue
        script = script_of(character)
        marked = loses_marks(character)
        letters += count
        needed += count * (marked and script not in _OPTIONAL_MARKS)
        latin += count * (script == "LATIN")
        latin_marked += count * (marked and script in ("LATIN", "COMBINING"))
    return needed > _NEEDED_SHARE * letters or latin_marked > _DENSE_SHARE * latin
