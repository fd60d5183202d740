"""A run keeps what it needs of its corpus from the start, and notices when the corpus changes."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL, records
from small_corpus import make_corpus

from fusebert.train.corpus.format import CorpusError, file_sha256
from fusebert.train.corpus.reader import Corpus
from fusebert.train.errors import UserError
from fusebert.train.run.inputs import RunInputs
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.step import TrainingStep


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two corpora of other texts and vocabularies, of the same size."""
    place = tmp_path_factory.mktemp("corpora")
    for name in ("one", "other"):
        (place / name).mkdir()
    return make_corpus(place / "one"), make_corpus(place / "other", seed=1)


def in_step_2(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    original, steps = TrainingStep.__call__, [0]

    def step(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2:
            change()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", step)


def run(corpus: Path, out: Path, **settings: Any) -> None:
    pretrain(PretrainSettings(data=corpus, out=out, **{**SMALL, "steps": 4, **settings}), resume_command="RESUME")


@pytest.mark.parametrize("how", ["rebuilt", "deleted"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_that_goes_away_changes_nothing(
    prepared: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
    workers: int,
) -> None:
    """The exported model has the tokenizer that it was trained with, and the run the losses of an undisturbed one."""
    one, other = prepared
    if how == "rebuilt" and not workers:
        run(one, tmp_path / "straight")
    corpus = shutil.copytree(one, tmp_path / "corpus")
    tokenizer = file_sha256(corpus / "tokenizer.json")

    def change() -> None:
        shutil.rmtree(corpus)
        if how == "rebuilt":
            shutil.copytree(other, corpus)

    in_step_2(monkeypatch, change)
    run(corpus, tmp_path / "run", workers=workers)
    assert file_sha256(tmp_path / "run" / "hf" / "tokenizer.json") == tokenizer
    assert file_sha256(tmp_path / "run" / "inputs" / "tokenizer.json") == tokenizer
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"{corpus}/manifest.json was {'replaced' if how == 'rebuilt' else 'deleted'}" in warning
    assert "cannot be resumed without that corpus" in warning
    if how == "rebuilt" and not workers:
        losses = [[r["mlm_loss"] for r in records(tmp_path / name, "train")] for name in ("straight", "run")]
        assert losses[0] == losses[1]


def test_text_overwritten_under_a_run_stops_it(
    prepared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = shutil.copytree(prepared[0], tmp_path / "corpus")

    def change() -> None:
        with open(corpus / "train-00000.tokens.npy", "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\1\0")

    in_step_2(monkeypatch, change)
    with pytest.raises(UserError, match=r"train-00000.tokens.npy was overwritten.*last good checkpoint is .*00000001"):
        run(corpus, tmp_path / "run", save_every=1)


def test_a_new_time_is_no_change(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    corpus = shutil.copytree(prepared[0], tmp_path / "corpus")
    inputs = RunInputs(Corpus.open(corpus))
    for path in corpus.iterdir():
        os.utime(path)
    assert inputs.changes() == []


def test_a_copy_that_was_changed_is_written_again(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    inputs = RunInputs(Corpus.open(prepared[0]))
    path = inputs.keep(tmp_path)
    path.write_text("{}")
    assert inputs.keep(tmp_path) == path
    assert path.read_bytes() == inputs.tokenizer == (prepared[0] / "tokenizer.json").read_bytes()


def test_a_corpus_replaced_while_the_run_starts(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    corpus = shutil.copytree(prepared[0], tmp_path / "corpus")
    opened = Corpus.open(corpus)
    assert len(opened.split("train").shards[0].tokens)
    worker = pickle.loads(pickle.dumps(opened))
    for path in corpus.iterdir():
        content = path.read_bytes()
        path.rename(tmp_path / path.name)  # so that its inode is not used again
        path.write_bytes(content)
    with pytest.raises(CorpusError, match="was replaced since it was first read"):
        len(worker.split("train").shards[0].tokens)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["unigram_entropy"] += 1.0
    del manifest["sha256"]  # as in an older corpus
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match="changed while the run started"):
        RunInputs(opened)


def test_a_run_from_a_folder_goes_on_without_the_folder(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    run(prepared[0], tmp_path / "first", steps=1)
    start = shutil.copytree(tmp_path / "first" / "hf", tmp_path / "start")
    settings = {"model": "auto", "init_from": start}
    run(prepared[0], tmp_path / "run", steps=1, **settings)
    shutil.rmtree(start)
    run(prepared[0], tmp_path / "run", steps=2, resume=True, **settings)
