"""What a run starts from: sizes by hand, a config.json, and folders that have, or lack, the corpus's vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL
from small_corpus import make_corpus, write_text
from tokenizers import Tokenizer

from fusebert.model.config import BertConfig
from fusebert.model.hf import from_hf, save_hf
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.errors import UserError
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.report import Report
from fusebert.train.run.settings import PretrainSettings


def run(corpus: Path, out: Path, **settings: Any) -> Report:
    report = pretrain(PretrainSettings(data=corpus, out=out, **{**SMALL, "steps": 1, **settings}), "RESUME")
    assert report is not None
    return report


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def first(corpus: Path) -> Path:
    """A run of one step."""
    run(corpus, corpus.parent / "first")
    return corpus.parent / "first"


def model_in(folder: Path, rows: int, tokenizer: Path | None) -> Path:
    """A new model with ``rows`` embeddings, with the tokenizer's vocab.txt alone."""
    torch.manual_seed(0)
    save_hf(BertForPreTraining(BertConfig.preset("tiny", rows)), folder, tokenizer)
    if tokenizer is not None:
        (folder / "tokenizer.json").unlink()
    return folder


def test_sizes_by_hand(corpus: Path, tmp_path: Path) -> None:
    sizes = {"layers": 3, "hidden_size": 64, "heads": 4, "intermediate_size": 96, "max_positions": 600}
    report = run(corpus, tmp_path / "run", **sizes, seqlen=520, tokens_per_batch=1040)
    assert report.model == "BERT (3 layers, 64 wide)"
    config = from_hf(tmp_path / "run" / "hf").config
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert (*found, config.max_position_embeddings) == tuple(sizes.values())
    # A continued run keeps them.
    resumed = PretrainSettings(corpus, tmp_path / "run", **{**SMALL, **sizes, "seqlen": 520, "tokens_per_batch": 1040})
    report = pretrain(type(resumed)(**{**vars(resumed), "steps": 2, "resume": True}), "RESUME")
    assert report is not None
    assert report.steps == 2


def test_a_width_decides_what_is_not_given(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", hidden_size=192, layers=1)
    config = from_hf(tmp_path / "run" / "hf").config
    assert (config.num_attention_heads, config.intermediate_size, config.num_hidden_layers) == (3, 768, 1)


def test_a_config_file(corpus: Path, tmp_path: Path) -> None:
    fields = {
        "model_type": "bert",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.5,
        "layer_norm_eps": 1e-6,
        "transformers_version": "5",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    run(corpus, tmp_path / "run", model="auto", config=path, dropout=0.2)
    config = from_hf(tmp_path / "run" / "hf").config
    assert (config.hidden_size, config.intermediate_size, config.layer_norm_eps) == (32, 48, 1e-6)
    assert (config.vocab_size, config.hidden_dropout_prob) == (Corpus.open(corpus).vocab_size, 0.2)
    path.unlink()  # a continued run has its configuration in the checkpoint
    run(corpus, tmp_path / "run", model="auto", config=path, lr=1e-3, steps=2, resume=True)
    for change, message in (
        ({"hidden_size": "32"}, "hidden_size must be a positive integer; got '32'"),
        ({"hidden_size": 33}, "multiple of num_attention_heads"),
        ({"model_type": "roberta"}, "model_type must be 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu'"),
        ({"is_decoder": True}, "is_decoder"),
    ):
        path.write_text(json.dumps({**fields, **change}))
        with pytest.raises((UserError, ValueError), match=f"--config .*{message}"):
            run(corpus, tmp_path / "bad", model="auto", config=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "auto", "init_from": Path("x"), "layers": 2}, "--init-from defines the model: leave out --layers"),
        ({"model": "auto", "init_from": Path("x"), "config": Path("y")}, "leave out --config"),
        ({"config": Path("y")}, "--config defines the model: leave out --model"),
        ({"model": "auto", "config": Path("no.json")}, "--config no.json cannot be read"),
        ({"heads": 3}, "--hidden-size and the other sizes: hidden_size must be a multiple"),
        ({"layers": 0}, "--layers must be positive; got 0"),
        ({"hidden_size": 1 << 20}, "--hidden-size must be at most 16384"),
        ({"seqlen": 1024, "tokens_per_batch": 1024}, "more than the model's 512 positions; --max-positions raises"),
    ],
)
def test_sizes_that_contradict_each_other(corpus: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "run", **options)


def test_a_vocabulary_that_is_padded_to_a_multiple(corpus: Path, tmp_path: Path) -> None:
    opened = Corpus.open(corpus)
    rows = -(-opened.vocab_size // 64) * 64 + 64
    padded = model_in(tmp_path / "padded", rows, opened.tokenizer_path)
    run(corpus, tmp_path / "run", model="auto", init_from=padded)
    assert from_hf(tmp_path / "run" / "hf").config.vocab_size == rows
    bare = model_in(tmp_path / "bare", rows, None)
    with pytest.raises(UserError, match=f"vocabulary of {rows} tokens"):
        run(corpus, tmp_path / "other", model="auto", init_from=bare)


def test_added_tokens_get_rows(corpus: Path, first: Path, tmp_path: Path) -> None:
    """A corpus with the model's tokenizer and three tokens more."""
    tokenizer = Tokenizer.from_file(str(first / "hf" / "tokenizer.json"))
    tokenizer.add_tokens(["harbour", "meadowland", "foxglove"])  # the first is there already
    tokenizer.save(str(tmp_path / "more.json"))
    text = write_text(tmp_path / "text.txt")
    prepare(PrepareSettings(tmp_path / "more", [str(text)], tokenizer=tmp_path / "more.json", heldout=0.1, workers=1))
    old = Corpus.open(corpus).vocab_size
    run(tmp_path / "more", tmp_path / "run", model="auto", init_from=first / "hf", lr=1e-12)
    before, after = from_hf(first / "hf"), from_hf(tmp_path / "run" / "hf")
    assert after.config.vocab_size == Corpus.open(tmp_path / "more").vocab_size == old + 2
    for name, value in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name][: len(value)], value, atol=1e-6), name
    assert after.state_dict()["encoder.embeddings.word_embeddings.weight"][old:].std() > 0.01


def test_a_vocab_txt_is_compared(corpus: Path, tmp_path: Path) -> None:
    opened = Corpus.open(corpus)
    folder = model_in(tmp_path / "model", opened.vocab_size, opened.tokenizer_path)
    run(corpus, tmp_path / "run", model="auto", init_from=folder)
    lines = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*lines[:9], *lines[10:], lines[9]]))
    with pytest.raises(UserError, match=r"another vocabulary .* of the same size"):
        run(corpus, tmp_path / "other", model="auto", init_from=folder)


def test_another_normaliser_is_warned_of(corpus: Path, first: Path, tmp_path: Path) -> None:
    shutil.copytree(first / "hf", tmp_path / "cased")
    path = tmp_path / "cased" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(content))
    words = r"lowercase: False there, True in the corpus.*0.00% of the corpus's tokens are \[UNK\]"
    with pytest.warns(UserWarning, match=words):
        run(corpus, tmp_path / "run", model="auto", init_from=tmp_path / "cased")


def test_the_folder_of_a_run_or_a_checkpoint_points_to_its_model(corpus: Path, first: Path, tmp_path: Path) -> None:
    checkpoint = first / "checkpoints" / "step-00000001"
    for folder, what in ((first, "a run"), (checkpoint, "a checkpoint")):
        with pytest.raises(UserError, match=f"is the folder of {what}, not of a model: give {first / 'hf'}"):
            run(corpus, tmp_path / "run", model="auto", init_from=folder)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(first / "checkpoints", unfinished / "checkpoints")
    with pytest.raises(UserError, match=f"fusebert export {unfinished} --out DIR writes one"):
        run(corpus, tmp_path / "run", model="auto", init_from=unfinished)
