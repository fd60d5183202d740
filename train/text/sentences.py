"""Splits documents into sentences.

`blingfire` finds the boundaries (it handles abbreviations and initials, at 20 MB/s per core). It reads a line end as a
space, so a hard-wrapped paragraph is one text; paragraphs, which blank lines separate, are split one by one. It lacks
the sentence ends of many scripts, which are added by script: characters with Unicode's property Sentence_Terminal
(danda, ։, ።, ။, …), the Greek question mark, spaces in Thai and Lao, and full stops in text without capitals. `lines`
reads each line as a sentence, for text that is already split. Long sentences are not cut here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import regex

from ..errors import UserError

SPLITTERS = ("auto", "blingfire", "lines")
_BLANK_LINES = re.compile(r"\n\s*\n")

_TIBETAN = "\u0f0d-\u0f11"  # the shads, which end phrases and sentences and lack the property
_KNOWN = r"!.?\u061f\u06d4\u2024\u203c\u203d\u2047-\u2049\u3002\uff01\uff1f"  # blingfire splits after these
_CLOSING = r"[\p{Pe}\p{Pf}\"'\u00ab\u00bb]*"
_ENDS = "|".join(
    [
        rf"[[\p{{Sentence_Terminal}}{_TIBETAN}]--[{_KNOWN}]]+{_CLOSING}(?![\p{{Pe}}\p{{Pf}},;:\u060c])",
        r"(?<=\p{Greek})[;\u037e](?=\s)",
        # Thai and Lao have no full stop: a space ends a clause.
        r"(?<=[\p{Thai}\p{Lao}])(?=\ [\p{Thai}\p{Lao}])",
    ]
)
_END = regex.compile(_ENDS, regex.VERSION1)
_OTHER_SCRIPT = regex.compile(
    rf"[[\p{{Sentence_Terminal}}{_TIBETAN}\u037e\p{{Greek}}\p{{Thai}}\p{{Lao}}]--[{_KNOWN}]]", regex.VERSION1
)
# In text without capitals a full stop ends a sentence, unless one letter or an abbreviation is before it.
_STOP = regex.compile(
    rf"(?<!(?:^|[^\p{{L}}])(?:\p{{L}}|mr|mrs|ms|dr|prof|st|no|vs|etc|e\.g|i\.e|cf|fig|approx|inc|vol|pp|al)[.])"
    rf"(?<=[.!?…]{_CLOSING})\ (?=[\p{{L}}\p{{N}}\p{{Ps}}\p{{Pi}}\"'])"
)

Splitter = Callable[[str], list[str]]


def sentence_splitter(name: str) -> Splitter:
    """A function from a document to its sentences, with normalised spaces and without empty sentences.

    Args:
        name: "blingfire", "lines", or "auto", which is blingfire.

    Raises:
        UserError: ``name`` is another, or blingfire is not installed.
    """
    if name not in SPLITTERS:
        raise UserError(f"there is no sentence splitter {name!r}: choose one of {', '.join(SPLITTERS)}")
    if name == "lines":
        return lambda document: [s for line in document.split("\n") if (s := " ".join(line.split()))]
    try:
        from blingfire import text_to_sentences
    except (ImportError, OSError) as error:  # OSError: the wheel's library is for another platform
        raise UserError(
            "splitting sentences needs a package: pip install blingfire (x86-64 only), or give text with one sentence "
            "per line and --sentences lines"
        ) from error

    def split(document: str) -> list[str]:
        sentences = []
        for paragraph in _BLANK_LINES.split(document):
            paragraph = " ".join(paragraph.split())
            if paragraph:
                # blingfire returns "" for text that it cannot handle.
                found = text_to_sentences(paragraph) or paragraph
                if not paragraph.isascii() and _OTHER_SCRIPT.search(paragraph):
                    found = _END.sub(r"\g<0>\n", found)
                if paragraph.islower():
                    found = _STOP.sub("\n", found)
                sentences += [s for line in found.split("\n") if (s := line.strip())]
        return sentences

    return split
