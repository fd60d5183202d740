"""Any checkpoint of a run becomes a folder that Transformers loads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import SMALL, weights
from safetensors.torch import load_file
from small_corpus import make_corpus

from fusebert.train import cli
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; its corpus is gone."""
    place = tmp_path_factory.mktemp("export")
    corpus, out = make_corpus(place), place / "run"
    settings = {**SMALL, "data": corpus, "out": out, "steps": 2, "save_every": 1, "dropout": 0.25}
    pretrain(PretrainSettings(**settings), resume_command="RESUME")
    shutil.rmtree(corpus)
    return out


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """(exit status, what was printed) of ``fusebert export``."""
    monkeypatch.setattr(sys, "argv", ["fusebert", "export", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out + printed.err


def test_the_newest_checkpoint_is_what_the_run_exported(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    status, words = call(monkeypatch, capsys, run, "--out", out)
    assert status == 0, words
    assert "step 2 " in words
    theirs = run / "hf"
    assert {path.name for path in out.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_earlier_checkpoint_loads_in_transformers(run, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "model"
    status, words = call(monkeypatch, capsys, run / "checkpoints" / "step-00000001", "--out", out)
    assert status == 0, words
    model = transformers.BertForPreTraining.from_pretrained(out)
    assert model.config.hidden_dropout_prob == 0.25
    words = load_file(out / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    saved = next(x for x in weights(run, 1).values() if x.shape == words.shape)
    assert torch.equal(words, saved)
    assert transformers.AutoTokenizer.from_pretrained(out)("The fox lives in the forest.")["input_ids"]


@pytest.mark.parametrize("damage", ["cut", "no checkpoint", "no tokenizer"])
def test_what_cannot_be_exported(damage, run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    if damage == "cut":
        for path in copy.glob("checkpoints/*/model.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
    else:
        (copy / "inputs" / "tokenizer.json").unlink()
    status, words = call(monkeypatch, capsys, copy, "--out", tmp_path / "model")
    assert status == 2
    assert str(copy) in words
    assert "Traceback" not in words
    assert not (tmp_path / "model").exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step-00000002" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    status, words = call(monkeypatch, capsys, copy, "--out", tmp_path / "model")
    assert status == 0
    assert "warning" in words
    assert "step 1 " in words
