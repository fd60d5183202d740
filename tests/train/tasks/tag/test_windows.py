"""Windows of tokens: each word is read once, at its first token, where it has the most context."""

import random
from pathlib import Path

import numpy as np
import pytest

from fusebert.model.hf.encoders import open_encoder
from fusebert.train.errors import UserError
from fusebert.train.tasks.tag.windows import WordTokenizer

WORDS = ["The", "young", "owl", "transmogrification", "\x00", ".", "unbelievably", "supercalifragilistic", "日本"]


@pytest.mark.parametrize("seqlen", [64, 12, 8])
@pytest.mark.parametrize("overlap", [None, 0, 1, 5])
def test_each_word_is_read_once_with_the_most_context(seqlen: int, overlap: int | None, place: Path) -> None:
    rng = random.Random(0)
    sentences = [[rng.choice(WORDS) for _ in range(rng.randrange(40))] for _ in range(30)]
    tokenizer = WordTokenizer(open_encoder(place / "model"), seqlen, overlap)
    windows = tokenizer(sentences)
    plain = tokenizer._tokenizer
    plain.no_truncation()
    read = {
        (window.sentence, word): (window, row)
        for window in windows
        for word, row in zip(window.words, window.rows, strict=True)
    }
    assert len(read) == sum(len(window.words) for window in windows)
    lost = 0
    for number, words in enumerate(sentences):
        whole = plain.encode(words, is_pretokenized=True)
        mine = [window for window in windows if window.sentence == number]
        assert all(len(window.text) <= seqlen for window in mine)
        for word in range(len(words)):
            places = [i for i, owner in enumerate(whole.word_ids) if owner == word]
            lost += not places
            assert bool(places) == ((number, word) in read)
            if not places:
                continue
            window, row = read[number, word]
            # The window is a stretch of the sentence: it fits around the word's first token.
            before = places[0] - row
            assert window.text.ids[1:-1].tolist() == whole.ids[1 + before : before + len(window.text) - 1]
            left = row - 1 if before else 99
            right = len(window.text) - 2 - row if before + len(window.text) < len(whole.ids) else 99
            shared = (seqlen - 2) // 2 if overlap is None else overlap
            assert min(left, right) >= (shared - 1) // 2
    assert lost == tokenizer.without_token > 0


def test_short_sentences_are_one_window(place: Path) -> None:
    tokenizer = WordTokenizer(open_encoder(place / "model"))
    windows = tokenizer([["The", "owl"], [], ["\x00"]])
    assert [len(window.text) for window in windows] == [4, 2, 2]
    assert windows[0].rows.tolist() == [1, 2]
    assert [len(window.rows) for window in windows] == [2, 0, 0]
    with pytest.raises(UserError, match="--stride must be from 0 to 9, as a window has 10 tokens of text; got 10"):
        WordTokenizer(open_encoder(place / "model"), 12, 10)


def test_a_byte_level_tokenizer_sets_a_space_before_each_word(tmp_path: Path) -> None:
    """As Transformers' with add_prefix_space, which run_ner gives it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, RobertaConfig, RobertaForTokenClassification, RobertaTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(["the young owl lives in the tower"] * 3, vocab_size=300, special_tokens=special)
    bpe.save_model(str(tmp_path))
    theirs = RobertaTokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(theirs), max_position_embeddings=40, type_vocab_size=1, **sizes)
    RobertaForTokenClassification(config).save_pretrained(tmp_path)
    ours = WordTokenizer(open_encoder(tmp_path))
    words = ["the", "owl", "lives", "."]
    (window,) = ours([words])
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    expected = AutoTokenizer.from_pretrained(tmp_path)(words, is_split_into_words=True)
    assert window.text.ids.tolist() == expected.input_ids
    assert "Ġowl" in bpe.encode(" owl").tokens
    np.testing.assert_array_equal(window.words, range(4))
    (again,) = WordTokenizer(open_encoder(tmp_path))([words])
    assert again.text.ids.tolist() == expected.input_ids
