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


@pytest.mark.parametrize(
    "sentences",
    [
        ["यह एक है।", "दो है॥", "तीन?"],
        ['इसने कहा "ठीक है।"', "फिर गया।"],
        ["i saw dr. smith, e.g. at work.", "wait…", "3.14 is pi.", "is it?", "(yes.)"],
        ["Πού πάτε;", "Εγώ πάω."],
        ["A list; of things; in Latin."],
    ],
    ids=["danda", "danda and quotes", "no capitals", "Greek question mark", "semicolons"],
)
def test_sentence_ends_by_script(sentences):
    assert sentence_splitter("auto")(" ".join(sentences)) == sentences
