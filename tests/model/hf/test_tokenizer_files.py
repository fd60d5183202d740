"""The tokenizer's files that save_hf writes: AutoTokenizer encodes like the tokenizer.json they come from."""

import dataclasses
import json

import pytest
from bert_cases import MICRO
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from fusebert.model import BertForPreTraining, save_hf

TEXT = [
    "The quick brown fox, naïve café!",
    "它中文字 unaffable ABC-def's 123",
    "[CLS] a [MASK] b[MASK]c [SEP]",
    "",
    "Ünïcode\tand\x07  spaces",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_tokenizer(lowercase=True, special=SPECIAL, **normalizer):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer):
    """The tokenizer, which puts special tokens around a text as pretraining does."""
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


def short_word_tokenizer():
    tokenizer = bert_tokenizer()
    tokenizer.model = models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=6)
    return tokenizer


def bare_tokenizer():
    description = {**json.loads(bert_tokenizer().to_str()), "post_processor": None}
    return Tokenizer.from_str(json.dumps(description))


def odd_tokenizer():
    tokenizer = bert_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def sparse_tokenizer():
    tokenizer = bert_tokenizer()
    tokenizer.add_tokens([AddedToken("fox, naïve", lstrip=True)])
    return tokenizer


TOKENIZERS = {
    "uncased": bert_tokenizer,
    "cased": lambda: bert_tokenizer(lowercase=False),
    "cased, accents stripped": lambda: bert_tokenizer(lowercase=False, strip_accents=True),
    "Chinese together": lambda: bert_tokenizer(handle_chinese_chars=False),
    "special tokens elsewhere": lambda: bert_tokenizer(special=SPECIAL[::-1]),
    "a mask only as a word": lambda: bert_tokenizer(special=[*SPECIAL[:4], AddedToken("[MASK]", single_word=True)]),
    "no mask": lambda: bert_tokenizer(special=SPECIAL[:4]),
    "control characters kept": lambda: bert_tokenizer(clean_text=False),
    "short words only": short_word_tokenizer,
    "no special tokens around a text": bare_tokenizer,
    "another pipeline": odd_tokenizer,
    "an added token": sparse_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_auto_tokenizer_encodes_as_the_tokenizers_library(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = BertForPreTraining(dataclasses.replace(MICRO, vocab_size=96))
    save_hf(model, tmp_path / "bert", tmp_path / "tokenizer.json")

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    if kind == "no special tokens around a text":
        tokenizer = with_special_tokens(tokenizer)
    for text in TEXT:
        ours, their = tokenizer.encode(text), theirs(text)
        assert their["input_ids"] == ours.ids, text
        assert their["attention_mask"] == ours.attention_mask
    ours, their = tokenizer.encode(TEXT[0], TEXT[1]), theirs(TEXT[0], TEXT[1])
    assert (their["input_ids"], their["token_type_ids"]) == (ours.ids, ours.type_ids)
    assert len(theirs) == tokenizer.get_vocab_size()
    assert theirs.model_max_length == MICRO.max_position_embeddings
    for role, token in zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True):
        assert getattr(theirs, f"{role}_token_id") == tokenizer.token_to_id(token), role


def test_tokenizer_files(tmp_path):
    tokenizer = bert_tokenizer(lowercase=False)
    tokenizer.save(str(tmp_path / "tok.json"))
    save_hf(
        BertForPreTraining(dataclasses.replace(MICRO, vocab_size=96)), tmp_path / "bert", str(tmp_path / "tok.json")
    )
    assert (tmp_path / "bert" / "tokenizer.json").read_bytes() == (tmp_path / "tok.json").read_bytes()
    settings = json.loads((tmp_path / "bert" / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["do_lower_case"]) == ("BertTokenizer", False)
    vocabulary = (tmp_path / "bert" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert vocabulary == [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]


OTHER = {
    "none": None,
    "RoBERTa's, without types": processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "no separator": processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    ),
    "BERT's": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
}


@pytest.mark.parametrize("kind", OTHER)
def test_the_exported_tokenizer_adds_what_pretraining_adds(tmp_path, kind):
    tokenizer = bare_tokenizer()
    if OTHER[kind] is not None:
        tokenizer.post_processor = OTHER[kind]
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tok.json"))
    save_hf(BertForPreTraining(dataclasses.replace(MICRO, vocab_size=96)), tmp_path / "bert", tmp_path / "tok.json")
    saved = json.loads((tmp_path / "bert" / "tokenizer.json").read_text())
    assert saved["padding"] is saved["truncation"] is None
    exported = Tokenizer.from_file(str(tmp_path / "bert" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    wanted = with_special_tokens(tokenizer)
    for texts in ((TEXT[0],), (TEXT[0], TEXT[1])):
        ours, theirs = wanted.encode(*texts), exported.encode(*texts)
        assert (theirs.ids, theirs.type_ids) == (ours.ids, ours.type_ids)
    if kind == "BERT's":
        assert saved["post_processor"]["type"] == "BertProcessing"


def test_tokenizers_that_are_rejected(tmp_path):
    model = BertForPreTraining(MICRO)
    bert_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json has \d\d tokens, but the model's vocab_size is 61"):
        save_hf(model, tmp_path / "bert", tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="nothing is not a file"):
        save_hf(model, tmp_path / "bert", tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        save_hf(model, tmp_path / "bert", tmp_path / "tokenizer.json")
    assert not (tmp_path / "bert").exists()
