"""A run can be repeated from its folder alone, to the bit on a CPU."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, command_line, weights
from small_corpus import make_corpus

from fusebert.train import cli
from fusebert.train.errors import UserError
from fusebert.train.run.manifest import compare, options_to_repeat, read_manifest
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fusebert", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and a run on it that was continued once."""
    place = tmp_path_factory.mktemp("made")
    corpus, out = make_corpus(place), place / "run"
    settings: dict[str, Any] = {**SMALL, "data": corpus, "out": out, "batch_tokens": 512, "lr": None, "steps": 4}
    pretrain(PretrainSettings(**settings, save_every=2), resume_command="RESUME --resume")
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    pretrain(PretrainSettings(**settings, resume=True), resume_command="RESUME --resume")
    return corpus, out


def test_a_run_is_repeated_to_the_bit(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = made
    threads = torch.get_num_threads()
    assert call(monkeypatch, "pretrain", "--reproduce", out) == 0
    torch.set_num_threads(threads)
    assert f"step-00000004: the weights are those of {out}, to the bit" in capsys.readouterr().out
    ours, theirs = weights(out, 4), weights(out.with_name("run-reproduced"), 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_manifest_has_everything(made: tuple[Path, Path]) -> None:
    corpus, out = made
    content = read_manifest(out)
    assert content["command"] == "RESUME"
    assert content["settings"]["lr"] == 2e-3  # chosen by the run
    assert content["settings"]["data"] == str(corpus)
    assert content["seeds"] == {"run": 0, "held-out": 0}
    assert content["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert content["identity"]["--data (tokenizer)"]
    assert [each["step"] for each in content["sessions"]] == [0, 2]


def changed(made: tuple[Path, Path], place: Path, **values: Any) -> Path:
    """A copy of the run; its second session had other settings."""
    out = shutil.copytree(made[1], place / "copy")
    content = json.loads((out / "run.json").read_text())
    content["sessions"][1]["settings"].update(values)
    if "steps" in values:
        content["settings"].update(values)
    (out / "run.json").write_text(json.dumps(content))
    return out


def test_what_cannot_be_repeated_says_why(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with --minutes the learning rate followed the clock"):
        options_to_repeat(changed(made, tmp_path / "1", steps=None, minutes=5.0))
    with pytest.raises(UserError, match="continued after step 2 with another --lr"):
        options_to_repeat(changed(made, tmp_path / "2", lr=1.0))
    assert options_to_repeat(changed(made, tmp_path / "3", workers=2))["steps"] == 4
    with pytest.raises(UserError, match=r"has no run.json"):
        options_to_repeat(tmp_path)
    whole = json.loads((made[1] / "run.json").read_text())
    sessions = [json.dumps({**whole, "sessions": sessions}) for sessions in ([], [{"settings": {}}], 3)]
    for content in ("{", "[]", "{}", '{"version": 1}', "[" * 100_000, *sessions):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"run.json is damaged"):
            options_to_repeat(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**whole, "version": "\n"}))
    with pytest.raises(UserError, match=r"has format version '\\n'"):  # in one line
        options_to_repeat(tmp_path)


def test_another_corpus_or_other_weights_are_noticed(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = made
    other = make_corpus(tmp_path, seed=1)
    words = ["pretrain", "--reproduce", out, "--data", other, "--out", tmp_path / "again"]
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert "--data, " in error or "--data is" in error
    assert "is not that run's: give the corpus it was made from" in error
    assert not (tmp_path / "again").exists()
    copy = shutil.copytree(out, tmp_path / "copy")
    path = copy / "checkpoints" / "step-00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"the weights differ .* the versions and the processor are the same"):
        compare(out, copy)


def test_pretrain_still_needs_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, *command_line(steps=1)) == 2
    assert "Missing option" in capsys.readouterr().err


def test_a_continued_run_keeps_its_options(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only --out is given again; then another length and rate, which it says."""
    corpus, _ = made
    out, threads = tmp_path / "run", torch.get_num_threads()
    given = {**SMALL, "data": corpus, "out": out, "lr": 1e-3, "warmup": 0.5, "dropout": 0.0, "weight_decay": 0.2}
    assert call(monkeypatch, *command_line(**given, clip=0.5, steps=2)) == 0
    capsys.readouterr()
    assert call(monkeypatch, "pretrain", "--resume", "--out", out, "--steps", "4") == 0
    said = capsys.readouterr().out
    assert "continuing: other options than before: --steps 4 (before: 2)\n" in said
    assert "continuing: the learning rate goes on at 0.00075; with the options from before it would be 0\n" in said
    settings = read_manifest(out)["sessions"][1]["settings"]
    expected = {"lr": 1e-3, "warmup": 0.5, "dropout": 0.0, "weight_decay": 0.2, "clip": 0.5, "steps": 4, "threads": 1}
    assert {name: settings[name] for name in expected} == expected
    assert settings["tensorboard"] is False

    assert call(monkeypatch, "pretrain", "--out", out, "--resume", "--minutes", "0.01", "--lr", "2e-3") == 0
    said = capsys.readouterr().out
    assert "--steps None (before: 4), --minutes 0.01 (before: None), --lr 0.002 (before: 0.001)" in said
    assert call(monkeypatch, "pretrain", "--out", out, "--resume", "--steps", "3") == 0
    assert "the run has done 4 steps, more than --steps 3: nothing is left to train" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_a_run_of_an_earlier_version_continues_and_says_what_is_missing(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, first = made
    out = shutil.copytree(first, tmp_path / "run")
    (out / "run.json").unlink()
    settings: dict[str, Any] = {**SMALL, "data": corpus, "out": out, "batch_tokens": 512, "steps": 5, "resume": True}
    pretrain(PretrainSettings(**settings), resume_command="RESUME")
    assert "has no run.json: options that are not given again have their defaults" in capsys.readouterr().out
