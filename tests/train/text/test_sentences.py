"""Splitting documents into sentences."""

import sys

import pytest

from fusebert.train.errors import UserError
from fusebert.train.text.sentences import sentence_splitter


def test_sentences():
    split = sentence_splitter("auto")
    # A line end within a paragraph is a space; a blank line ends a sentence even without a full stop.
    assert split("Dr. Smith went\nhome. He   slept.\n \nA title\n\nThe text.") == [
        "Dr. Smith went home.",
        "He slept.",
        "A title",
        "The text.",
    ]
    assert sentence_splitter("lines")("One. Two.\n\n  three   four\n") == ["One. Two.", "three four"]
    long = "word " * 5000 + "end"
    assert split(long) == [long]
    with pytest.raises(UserError, match="choose one of auto, blingfire, lines"):
        sentence_splitter("nltk")


def test_without_blingfire(monkeypatch):
    monkeypatch.setitem(sys.modules, "blingfire", None)
    with pytest.raises(UserError, match=r"pip install blingfire.*--sentences lines"):
        sentence_splitter("auto")
