"""Splits documents into sentences.

`blingfire` finds the boundaries (it handles abbreviations and initials, at 20 MB/s per core). It reads a line end as a
space, so a hard-wrapped paragraph is one text; paragraphs, which blank lines separate, are split one by one. `lines`
reads each line as a sentence, for text that is already split. Long sentences are not cut here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..errors import UserError

SPLITTERS = ("auto", "blingfire", "lines")
_BLANK_LINES = re.compile(r"\n\s*\n")

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
                sentences += [s for line in found.split("\n") if (s := line.strip())]
        return sentences

    return split
