"""Vocabularies of bytes and of likely pieces: nothing is [UNK], and decoding gives the text back."""

import string

import pytest
from tokenizers import Tokenizer

from fusebert.train.text.special_tokens import SPECIAL_TOKENS, special_ids, special_names
from fusebert.train.text.subwords import LEARNERS

TEXT = [
    "The ships sailed through the wide ocean, and the sailors sang.",
    "She sells sea shells; the shells she sells are sea shells, surely.",
    "A tokenizer learns pieces of words that repeat: repeating, repeated, repeats.",
] * 5
# Scripts that TEXT does not have, an emoji, a word that is too long to learn from, the name of a special token.
STRANGE = [
    "Ünïcödé déjà vu",
    "มองเห็นภูเขา",
    "漢字かな交じり文",
    "में पढ़ता हूँ",
    "\N{GRINNING FACE} 12 !",
    "x" * 300,
    "a [MASK] b",
]


@pytest.fixture(scope="module", params=list(LEARNERS))
def learn(request):
    return lambda texts, **options: LEARNERS[request.param](texts, 600, options.pop("lowercase", False), **options)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_any_text_comes_back(learn):
    tokenizer = learn(TEXT)
    special = special_ids(tokenizer.get_vocab())
    for text in TEXT[:3] + STRANGE:
        found = ids(tokenizer, text)
        assert not set(found) & set(special), text
        assert tokenizer.decode(found).strip() == text


def test_what_repeats_becomes_longer_pieces(learn):
    tokenizer = learn(TEXT)
    letters = sum(character in string.ascii_letters for character in TEXT[1])
    assert len(ids(tokenizer, TEXT[1])) < 0.6 * letters


def test_a_word_keeps_its_marks_in_bpe():
    """GPT-2's pattern cuts it at each of them."""
    tokenizer = LEARNERS["bpe"](["में पढ़ता हूँ और वह भी पढ़ता है"] * 9, 600, False)
    assert len(ids(tokenizer, "में पढ़ता हूँ")) == 3


def test_special_tokens_come_first_and_the_template_is_berts(learn):
    tokenizer = learn(TEXT)
    assert tuple(special_ids(tokenizer.get_vocab())) == (0, 1, 2, 3, 4)
    pair = tokenizer.encode("shells", "ships")
    a, b = (ids(tokenizer, word) for word in ("shells", "ships"))
    assert pair.ids == [2, *a, 3, *b, 3]
    assert pair.type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)


def test_case_and_accents(learn):
    tokenizer = learn(TEXT, lowercase=True, strip_accents=True)
    assert tokenizer.decode(ids(tokenizer, "Déjà VU")).strip() == "deja vu"
    tokenizer = learn(TEXT, lowercase=True, strip_accents=False)
    assert tokenizer.decode(ids(tokenizer, "Déjà VU")).strip() == "déjà vu"


def test_the_order_of_the_texts_does_not_matter(learn):
    one, two = learn(TEXT), learn(TEXT[::-1])
    assert one.get_vocab() == two.get_vocab()


def test_long_runs_are_learned_from_only_if_wanted(learn):
    runs = ["acgtacgtttga" * 30 + " "] * 20
    words, dna = learn(TEXT + runs), learn(TEXT + runs, cut_runs=True)
    run = runs[0].strip()
    assert len(ids(dna, run)) < len(ids(words, run)) / 2
    assert dna.decode(ids(dna, run)).strip() == run


@pytest.mark.parametrize("size", [511, 1 << 23])
@pytest.mark.parametrize("name", list(LEARNERS))
def test_a_size_that_cannot_be(name, size):
    with pytest.raises(ValueError, match=r"vocab_size must be in \[512"):
        LEARNERS[name](TEXT, size, False)


def test_roles_not_names():
    roberta = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    assert special_names(roberta) == {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    assert tuple(special_ids(roberta)) == (1, 3, 0, 2, 4)
    both = roberta | {name: 5 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert tuple(special_ids(both)) == (5, 6, 7, 8, 9)
    del roberta["<mask>"]
    with pytest.raises(ValueError, match=r"lacks the special tokens \[MASK\] \(or <mask>\)"):
        special_names(roberta)
