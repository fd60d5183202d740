"""The tokenizer: learned the same way each time, BERT's in every other respect."""

import json
import os
import random
import string
import unicodedata

import pytest
from tokenizers import Tokenizer, models

from fusebert.train.errors import UserError
from fusebert.train.text.special_tokens import SPECIAL_TOKENS
from fusebert.train.text.tokenizer import bert_tokenizer, encoder, load_tokenizer, train_tokenizer


def some_texts(count=400, seed=0):
    """Words made of syllables, with rarer and rarer letters, capitals and punctuation."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghjklmnprst" for b in "aeiouäé"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800)]
    words += [chr(0x400 + i) * 2 for i in range(60)] + ["漢字", "Ünïted", "don't", "3.14"]
    return [" ".join(rng.choices(words, k=30)).capitalize() + "." for _ in range(count)]


@pytest.mark.parametrize("vocab_size", [64, 700])
def test_the_same_texts_give_the_same_vocabulary(vocab_size):
    texts = some_texts()
    learned = train_tokenizer(texts, vocab_size, lowercase=True)
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert train_tokenizer(texts, vocab_size, lowercase=True).to_str() == learned.to_str()
    vocab = learned.get_vocab()
    assert len(vocab) == vocab_size
    assert sorted(vocab.values()) == list(range(vocab_size))
    assert [vocab[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sum(len(token.removeprefix("##")) == 1 for token in vocab) <= vocab_size * 2 // 3 + 5


def test_pieces_are_learned_and_put_together_again():
    learned = train_tokenizer(some_texts(), 700, lowercase=True)
    text = some_texts(1, seed=5)[0]
    ids = learned.encode(text, add_special_tokens=False).ids
    assert len(ids) < 0.6 * len(text)
    folded = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    assert learned.decode(ids).replace(" ", "") == folded.replace(" ", "")
    cased = train_tokenizer(some_texts(), 700, lowercase=False)
    assert any(token != token.lower() for token in cased.get_vocab() if token not in SPECIAL_TOKENS)
    assert any("ä" in token for token in cased.get_vocab())
    assert not any("ä" in token for token in learned.get_vocab())


def test_a_small_text_gives_what_it_has():
    learned = train_tokenizer(["the cat the cat", "a cat"], 5000, lowercase=True)
    assert {"the", "cat"} <= set(learned.get_vocab())
    assert learned.get_vocab_size() < 40
    for size in (15, 1 << 32):
        with pytest.raises(ValueError, match=rf"\[16, 4194304\]; got {size}"):
            train_tokenizer(["a"], size, lowercase=True)


def test_words_that_become_unknown_for_their_length_are_not_learned_from():
    """Long runs take time without end, and are [UNK] anyhow. Short words beside punctuation in a run count."""
    texts = some_texts()
    learned = train_tokenizer(texts, 700, lowercase=True).to_str()
    rng = random.Random(0)
    noise = ["".join(rng.choices(string.ascii_letters, k=n)) for n in (101, 5000, 200_000)]
    assert train_tokenizer([*texts, *noise], 700, lowercase=True).to_str() == learned
    joined = ["/".join(text.split()) for text in texts]
    apart = [" / ".join(text.split()) for text in texts]
    assert train_tokenizer(joined, 700, lowercase=True).to_str() == train_tokenizer(apart, 700, lowercase=True).to_str()


def test_special_tokens_in_a_text_are_text(tmp_path):
    learned = train_tokenizer([*some_texts(), "[MASK] [CLS] mask cls [sep] pad unk" * 9], 900, lowercase=True)
    learned.enable_truncation(4)
    learned.enable_padding()
    learned.save(str(tmp_path / "tokenizer.json"))
    encoding = encoder(tmp_path / "tokenizer.json").encode("[MASK] [PAD][SEP]ba ba ba", add_special_tokens=False)
    assert set(encoding.ids) & {0, 2, 3, 4} == set()
    assert encoding.tokens[0] == "["
    assert len(encoding.ids) >= 12


def test_it_is_transformers_bert_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    learned = train_tokenizer(some_texts(), 700, lowercase=True)
    learned.save(str(tmp_path / "tokenizer.json"))
    vocab = learned.get_vocab()
    (tmp_path / "vocab.txt").write_text("".join(token + "\n" for token in sorted(vocab, key=vocab.get)))
    text, pair = some_texts(2, seed=3)
    ours = learned.encode(text, pair)
    for theirs in (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
        transformers.BertTokenizerFast.from_pretrained(tmp_path),
    ):
        assert theirs(text, pair)["input_ids"] == ours.ids
    assert theirs(text, pair)["token_type_ids"] == ours.type_ids
    assert theirs.mask_token_id == 4
    # And back: a vocab.txt of theirs is read as the same tokenizer.
    assert load_tokenizer(tmp_path / "vocab.txt").to_str() == learned.to_str()
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text, pair).ids == ours.ids


def test_whether_a_vocabulary_is_cased_shows(tmp_path):
    for tokens, cased in ((["a", "##b"], False), (["A", "a", "##b"], True)):
        (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *tokens]) + "\n")
        assert load_tokenizer(tmp_path / "vocab.txt").encode("A").tokens[1] == ("A" if cased else "a")
        assert load_tokenizer(tmp_path / "vocab.txt", lowercase=True).encode("A").tokens[1] == "a"


def test_a_vocabulary_with_marks_is_not_stripped(tmp_path):
    """Composed Hangul, voiced kana and combining marks come from text with marks only."""
    for token, text in (("한국", "한국"), ("が", "が"), ("में", "में"), ("café", "Café")):
        pieces = [c for c in text.lower()] + [f"##{c}" for c in text.lower()]
        tokens = dict.fromkeys([*SPECIAL_TOKENS, token, *pieces])
        (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n\n")  # with a blank line at the end
        assert load_tokenizer(tmp_path / "vocab.txt", lowercase=True).encode(text).tokens[1] == token
    assert load_tokenizer(tmp_path / "vocab.txt", strip_accents=True).encode("é").tokens[1] == "[UNK]"


def test_settings_beside_a_vocabulary_are_followed(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "a", "A", "漢字", "漢", "字"]))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenize_chinese_chars": false}')
    assert load_tokenizer(tmp_path / "vocab.txt").encode("A 漢字").tokens[1:-1] == ["a", "漢字"]
    assert load_tokenizer(tmp_path / "vocab.txt", lowercase=False).encode("A").tokens[1] == "A"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read .*move vocab\.txt away"):
        load_tokenizer(tmp_path / "vocab.txt")


def lacking(path):
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *string.ascii_lowercase])}
    data = json.loads(bert_tokenizer(vocab, lowercase=True).to_str())
    for token in ("[SEP]", "[MASK]"):
        del data["model"]["vocab"][token]
        data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] != token]
    data["post_processor"] = None
    path.write_text(json.dumps(data))


def with_id(path, number, added=False):
    """A tokenizer.json in which one token, of the model or added to it, has the id ``number``."""
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *string.ascii_lowercase])}
    data = json.loads(bert_tokenizer(vocab, lowercase=True).to_str())
    if added:
        data["added_tokens"].append({**data["added_tokens"][0], "content": "<new>", "id": number})
    else:
        data["model"]["vocab"]["zebra"] = number
    path.write_text(json.dumps(data))


def with_a_template_that_does_not_fit(path):
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *string.ascii_lowercase])}
    data = json.loads(bert_tokenizer(vocab, lowercase=True).to_str())
    del data["post_processor"]["special_tokens"]["[SEP]"]
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.json", None, "does not exist"),
        ("a.json", lambda p: p.mkdir(), "is a folder"),
        ("a.bin", lambda p: p.write_text(""), "must end in"),
        ("a.json", lambda p: p.write_text("{}"), "not a tokenizer.json"),
        (
            "a.json",
            lambda p: Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(p)),
            "WordLevel tokenizer: give one of",
        ),
        ("a.json", lacking, r"lacks the special tokens \[SEP\], \[MASK\]"),
        ("a.json", lambda p: with_id(p, 10**8), "'zebra' the id 100000000: ids must be below 4194304"),
        ("a.json", lambda p: with_id(p, 1 << 31), "'zebra' the id 2147483648"),
        ("a.json", lambda p: with_id(p, 1 << 32), "not a tokenizer.json"),
        ("a.json", lambda p: with_id(p, -1), "not a tokenizer.json"),
        ("a.json", lambda p: with_id(p, 10**400), "not a tokenizer.json"),
        ("a.json", lambda p: p.write_text('{"model":' * 10_000), "not a tokenizer.json .nested too deeply"),
        ("a.json", lambda p: p.write_text('{"model": ' + "9" * 5000 + "}"), "not a tokenizer.json"),
        ("a.json", with_a_template_that_does_not_fit, "not a tokenizer.json"),
        ("a.json", os.mkfifo, "is no regular file"),
        ("a.txt", lambda p: p.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nx\n"), r"lacks the special tokens \[MASK\]"),
        ("a.txt", lambda p: p.write_text("[PAD]\nx\nx\n"), "a.txt:3: 'x' a second time"),
        ("a.txt", lambda p: p.write_text("[PAD]\n\nx\n"), "a.txt:2: an empty line"),
        ("a.txt", lambda p: p.write_bytes(b"abc\n\xff"), "not UTF-8 at byte 4"),
    ],
)
def test_bad_files(tmp_path, name, write, message):
    if write is not None:
        write(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)


def test_case_is_the_json_files_own(tmp_path):
    train_tokenizer(some_texts(), 100, lowercase=True).save(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match="leave out --lowercase/--cased"):
        load_tokenizer(tmp_path / "a.json", lowercase=False)
