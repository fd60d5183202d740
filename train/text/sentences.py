"""Sentences of a document.

`blingfire` finds the boundaries (it knows abbreviations and initials; 20 MB/s a core). It takes a line end for a space,
so paragraphs, which blank lines separate, are split one by one, and a hard-wrapped paragraph is one text. `lines`
takes each line for a sentence, for text that was split before. No sentence is cut here, however long it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..errors import UserError

SPLITTERS = ("auto", "blingfire", "lines")
_BLANK_LINES = re.compile(r"\n\s*\n")

Splitter = Callable[[str], list[str]]


def sentence_splitter(name: str) -> Splitter:
    """The function from a document to its sentences, without empty ones, spaces normalised.

    Args:
        name: "blingfire"; "lines"; or "auto", which is blingfire.

    Raises:
        UserError: blingfire is not installed, or there is no such splitter.
    """
    if name not in SPLITTERS:
        raise UserError(f"there is no sentence splitter {name!r}: choose one of {', '.join(SPLITTERS)}")
    if name == "lines":
        return lambda document: [s for line in document.split("\n") if (s := " ".join(line.split()))]
    try:
        from blingfire import text_to_sentences
    except (ImportError, OSError) as error:  # OSError: a wheel whose library is another platform's
        raise UserError(
            "splitting sentences needs a package: pip install blingfire (x86-64 only), or give text with one sentence "
            "a line and --sentences lines"
        ) from error

    def split(document: str) -> list[str]:
        sentences = []
        for paragraph in _BLANK_LINES.split(document):
            paragraph = " ".join(paragraph.split())
            if paragraph:
                # It answers "" for what it can't handle.
                found = text_to_sentences(paragraph) or paragraph
                sentences += [s for line in found.split("\n") if (s := line.strip())]
        return sentences

    return split


__all__ = ["SPLITTERS", "Splitter", "sentence_splitter"]
