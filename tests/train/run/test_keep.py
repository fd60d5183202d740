"""Which checkpoints stay, which one is exported, and when a run without progress ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, records, weights
from safetensors.torch import load_file
from small_corpus import make_corpus

from fusebert.train.errors import UserError
from fusebert.train.run import loop
from fusebert.train.run.evaluate import Evaluation
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.report import Report
from fusebert.train.run.settings import PretrainSettings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus: Path, out: Path, **settings: Any) -> Report:
    report = pretrain(PretrainSettings(data=corpus, out=out, **{**SMALL, "eval_every": 1, **settings}), "RESUME")
    assert report is not None
    return report


def steps(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss falls until step 3 and rises from then on."""
    real = loop.evaluate_and_log

    def scripted(run: Any, stop: Any) -> Evaluation:
        with monkeypatch.context() as patched:
            loss = 5.0 + abs(run.state.step - 3) / 10
            patched.setattr(loop, "evaluate", lambda *_: Evaluation(loss, 0.1, None, None, 10, 0))
            return real(run, stop)

    monkeypatch.setattr(loop, "evaluate_and_log", scripted)
    monkeypatch.setattr("fusebert.train.run.pretrain.evaluate_and_log", scripted)


def test_the_newest_checkpoints_are_kept(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", steps=5, save_every=1, keep=3)
    assert steps(tmp_path / "run") == [3, 4, 5]
    for bad in ({"keep": 0}, {"patience": 0}):
        with pytest.raises(UserError, match=rf"--{next(iter(bad))} must be positive; got 0"):
            run(corpus, tmp_path / "bad", steps=1, **bad)


@pytest.mark.usefixtures("scripted")
def test_the_best_checkpoint_is_kept_and_exported(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = run(corpus, out, steps=6, keep=1, keep_best=True)
    assert steps(out) == [3, 6]
    assert (report.steps, report.model_step, report.after.mlm_loss) == (6, 3, 5.0)
    assert "those of step 3, the best evaluation" in report.as_text()
    exported = load_file(out / "hf" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    saved = next(x for x in weights(out, 3).values() if x.shape == exported.shape)
    assert torch.equal(exported, saved)
    # A continued run remembers it.
    report = run(corpus, out, steps=7, keep=1, keep_best=True, resume=True)
    assert (steps(out), report.model_step) == ([3, 7], 3)


@pytest.mark.usefixtures("scripted")
def test_a_run_without_progress_ends(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    report = run(corpus, out, steps=50, patience=2)
    assert (report.steps, report.model_step) == (5, 3)
    assert "no lower held-out loss in 2 evaluations since step 3" in capsys.readouterr().out
    assert max(record["step"] for record in records(out, "train")) == 5
    assert run(corpus, out, steps=50, patience=2, resume=True).steps == 5


@pytest.mark.usefixtures("scripted")
def test_without_these_options_the_last_model_is_exported(corpus: Path, tmp_path: Path) -> None:
    report = run(corpus, tmp_path / "run", steps=6)
    assert steps(tmp_path / "run") == [6]
    assert (report.model_step, report.after.mlm_loss) == (6, 5.3)
    assert "best evaluation" not in report.as_text()
