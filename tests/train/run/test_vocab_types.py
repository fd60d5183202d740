"""From text to a model with each kind of vocabulary; special tokens are known by what they are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from runs import SMALL
from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.implementations import SentencePieceUnigramTokenizer

from fusebert.model.batch import IGNORE
from fusebert.model.hf import tokenizer_files
from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import PackedExamples
from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.text import special_tokens
from fusebert.train.text.subwords import train_bpe

ROBERTA = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
SENTENCES = ("The fox number {} lives in the forest.", "It eats {} berries, and Ünïcödé too.", "มองเห็น {} ภูเขา")
DOCUMENTS = [" ".join(each.format(i) for each in SENTENCES) for i in range(60)]


def roberta(path: Path) -> Path:
    """A tokenizer.json as RoBERTa's: other names, another template, and a special token without a role."""
    text = train_bpe(DOCUMENTS, 600, False).to_str()
    for ours, theirs in ROBERTA.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    tokenizer = Tokenizer.from_str(text)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    tokenizer.add_special_tokens([AddedToken("<extra>")])
    tokenizer.save(str(path))
    return path


def sentencepiece(path: Path) -> Path:
    """A tokenizer.json as those that are converted from SentencePiece: XLM-R's names and order, no bytes."""
    tokenizer = SentencePieceUnigramTokenizer()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(DOCUMENTS, 600, show_progress=False, special_tokens=names, unk_token="<unk>")
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ids)
    tokenizer.save(str(path))
    return path


FOREIGN = {"roberta": roberta, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=["bpe", "unigram", *FOREIGN])
def corpus(request, tmp_path_factory) -> Corpus:
    place = tmp_path_factory.mktemp(request.param)
    (place / "a.txt").write_text("\n\n".join(DOCUMENTS))
    options = {"vocab_type": request.param, "vocab_size": 600}
    if request.param in FOREIGN:
        options = {"tokenizer": FOREIGN[request.param](place / "tokenizer.json")}
    return prepare(PrepareSettings(place / "corpus", [str(place / "a.txt")], heldout=0.1, **options))


@pytest.mark.filterwarnings("ignore:.*held out")
def test_prepare_finds_the_roles_and_no_unknown(corpus: Corpus) -> None:
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    roles = [tokenizer.id_to_token(i) for i in corpus.special]
    assert roles in (list(special_tokens.SPECIAL_TOKENS), list(ROBERTA.values()))
    report = corpus.manifest["report"]["splits"]["train"]
    assert report["unknown_share"] == 0
    assert not report["characters_without_token"]
    shard = corpus.split("train").shards[0]
    (text,) = (tokenizer.decode(shard.tokens[: shard.sentences[1]].tolist()),)
    assert text.strip().startswith("The fox number ")


def test_masks_leave_special_tokens_alone(corpus: Corpus) -> None:
    assert set(corpus.special) <= set(corpus.never_predicted)
    extra = Tokenizer.from_file(str(corpus.tokenizer_path)).token_to_id("<extra>")
    assert extra is None or extra in corpus.never_predicted
    shape = fit_shape(corpus.split("train"), 512, 64, mlm_probability=0.5)
    maker = BatchMaker(corpus, "train", shape, mlm_probability=0.5, whole_word=True)
    assert not maker._masker.maskable[list(corpus.never_predicted)].any()
    allowed = {corpus.special.cls, corpus.special.sep, corpus.special.mask}
    words = 0
    for batch in PackedExamples(maker, seed=0)[0]:
        labels = batch.masked_labels[batch.masked_labels != IGNORE]
        assert not np.isin(labels.numpy(), corpus.never_predicted).any()
        ids = set(batch.input_ids[: batch.num_tokens].tolist())
        assert ids & set(corpus.never_predicted) <= allowed
        words += len(labels)
    assert words
    begins = ~corpus.continues_word[corpus.split("train").shards[0].tokens]
    assert 0.1 < begins.mean() < 0.9


def test_the_export_encodes_as_in_pretraining(corpus: Corpus, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {**SMALL, "data": corpus.directory, "out": tmp_path / "run", "steps": 1, "whole_word": True}
    result = pretrain(PretrainSettings(**settings), resume_command="RESUME")
    assert result is not None
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    ours = Tokenizer.from_file(str(corpus.tokenizer_path))
    special = corpus.special
    found = (auto.pad_token_id, auto.unk_token_id, auto.cls_token_id, auto.sep_token_id, auto.mask_token_id)
    assert found == tuple(special)
    texts = [DOCUMENTS[7], "Fox, fox; \N{GRINNING FACE}!"]
    for text in [text for text in texts if special.unk not in ours.encode(text).ids]:
        a = ours.encode(text, add_special_tokens=False).ids
        assert auto(text)["input_ids"] == [special.cls, *a, special.sep]
        pair = auto(text, "It eats.")
        b = ours.encode("It eats.", add_special_tokens=False).ids
        assert pair["input_ids"] == [special.cls, *a, special.sep, *b, special.sep]
        assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True).strip() == text
    masked = auto(f"The {auto.mask_token} lives")["input_ids"]
    assert masked.count(special.mask) == 1
    assert transformers.BertForMaskedLM.from_pretrained(tmp_path / "run" / "hf").config.pad_token_id == special.pad


def test_both_packages_know_the_same_names() -> None:
    ours = {f"{role}_token": names for role, names in special_tokens.NAMES.items()}
    assert ours == tokenizer_files.SPECIAL_TOKENS
