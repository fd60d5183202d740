"""A whole run on a small corpus: it learns, stops and continues with the same bits, and reports errors."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from runs import SMALL, command_line, records, weights
from small_corpus import make_corpus

from fusebert.model.config import BertConfig
from fusebert.model.hf import from_hf, save_hf
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import heldout_batches
from fusebert.train.corpus.reader import Corpus
from fusebert.train.errors import UserError
from fusebert.train.run import checkpoint, clock, setup
from fusebert.train.run.evaluate import Evaluation, evaluate
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.report import Report
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.run.signals import Interrupted
from fusebert.train.step import stopwatch
from fusebert.train.step.step import TrainingStep


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(corpus: Path, out: Path, **settings: Any) -> Report:
    return pretrain(PretrainSettings(data=corpus, out=out, **{**SMALL, **settings}), resume_command="RESUME")


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["mlm_loss"], r["grad_norm"]) for r in records(out, "train")]


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    assert [step for step, _, _ in losses(one)] == list(range(1, steps + 1))
    assert losses(one) == losses(other)
    ours, theirs = weights(one, steps), weights(other, steps)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_learns_and_leaves_everything(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    report = run(corpus, out, steps=100, tokens_per_batch=512, lr=4e-3, dropout=0.0, eval_every=25, log_every=10)

    assert report.after.mlm_loss < 0.85 * report.unigram_entropy < report.before.mlm_loss
    assert "clearly below the unigram entropy" in report.as_text()
    assert report.after.mlm_accuracy > report.before.mlm_accuracy
    assert report.tokens == pytest.approx(100 * 512, rel=0.05)

    logged = records(out, "train")
    assert [r["step"] for r in logged] == sorted([*range(10, 110, 10), 25, 75])
    assert [r["step"] for r in records(out, "eval")] == [0, 25, 50, 75, 100]
    last = logged[-1]
    for name in ("mlm_loss", "nsp_loss", "nsp_accuracy", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"):
        assert last[name] >= 0, name
    assert last["mfu"] > 0  # other processes may have slowed the measurement of the matmul rate: no upper bound

    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved = json.loads((out / "report.json").read_text())
    assert saved["after"]["mlm_loss"] == report.after.mlm_loss
    assert (out / "report.md").read_text() == report.as_text()
    assert len(report.guesses) == 5
    assert all(guess.sentence.count("[MASK]") == 1 and len(guess.guesses) == 5 for guess in report.guesses)
    assert f"{report.after.mlm_loss:.3f}" in capsys.readouterr().out

    # The exported model is the evaluated one, with its tokenizer.
    opened = Corpus.open(corpus)
    shape = fit_shape(opened.split("train"), 512, 32)
    heldout = heldout_batches(BatchMaker(opened, "heldout", shape), tokens=setup.HELDOUT_TOKENS["cpu"])
    again = evaluate(from_hf(out / "hf"), heldout, torch.float32)
    assert again.mlm_loss == pytest.approx(report.after.mlm_loss, rel=1e-5)
    assert (out / "hf" / "tokenizer.json").is_file()


def without_last_checkpoint(corpus: Path, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """A complete run, and a copy of it that has lost its last checkpoint."""
    complete, cut = tmp_path / "complete", tmp_path / "cut"
    run(corpus, complete, **settings)
    shutil.copytree(complete, cut)
    shutil.rmtree(checkpoint.list_checkpoints(cut / "checkpoints")[0])
    return complete, cut


def test_continuing_is_bit_identical(corpus: Path, tmp_path: Path) -> None:
    """Six steps, and the same run continued after its third; with dropout and two micro-batches a step."""
    settings = {"steps": 6, "save_every": 3, "batch_tokens": 512}
    complete, cut = without_last_checkpoint(corpus, tmp_path, **settings)
    torch.rand(1)  # another process has another generator state
    run(corpus, cut, resume=True, **settings)
    assert_same_run(complete, cut, steps=6)
    assert checkpoint.read_state(cut / "checkpoints" / "step-00000006").batches == 12


def test_continuing_in_fp16_with_lamb_is_bit_identical(corpus: Path, tmp_path: Path) -> None:
    """The checkpoint holds the loss scale and LAMB's state; the optimiser cannot change."""
    settings = {"steps": 4, "save_every": 2, "precision": "fp16", "optimizer": "lamb", "checkpoint_activations": True}
    complete, cut = without_last_checkpoint(corpus, tmp_path, **settings)
    with pytest.raises(UserError, match=r"another --optimizer \(lamb there, adamw here\)"):
        run(corpus, cut, resume=True, **{**settings, "optimizer": "adamw"})
    saved, last = (cut / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    content = json.loads((saved / "trainer.json").read_text())
    scale = content["state"]["loss_scale"]
    assert scale["_growth_tracker"] == 2
    scale["scale"] /= 4  # shows that the saved scale is used
    content["version"] = 2  # without a checksum
    (saved / "trainer.json").write_text(json.dumps(content))
    run(corpus, cut, resume=True, **settings)
    assert checkpoint.read_state(last).loss_scale == {**scale, "_growth_tracker": 4}
    assert [step for step, _, _ in losses(cut)] == [1, 2, 3, 4]
    shutil.rmtree(last)
    scale["scale"] *= 4
    (saved / "trainer.json").write_text(json.dumps(content))
    run(corpus, cut, resume=True, **settings)
    assert_same_run(complete, cut, steps=4)


def test_continuing_with_muon_is_bit_identical(corpus: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "save_every": 2, "optimizer": "muon", "schedule": "wsd", "mlm_probability": 0.3}
    complete, cut = without_last_checkpoint(corpus, tmp_path, **settings)
    run(corpus, cut, resume=True, **settings)
    assert_same_run(complete, cut, steps=4)
    # Its first evaluation is that of a run that masks at 0.15.
    run(corpus, tmp_path / "other", steps=1)
    masked, usual = (records(out, "eval")[0]["mlm_loss"] for out in (complete, tmp_path / "other"))
    assert masked == pytest.approx(usual, abs=1e-6)


def test_continuing_with_fewer_and_fewer_masks_is_bit_identical(corpus: Path, tmp_path: Path) -> None:
    """Two micro-batches a step; with cautious decay and a z-loss."""
    settings = {
        "steps": 6,
        "save_every": 3,
        "batch_tokens": 512,
        "mlm_probability": 0.3,
        "mlm_probability_end": 0.1,
        "weight_decay": 0.1,
        "cautious_decay": True,
        "z_loss": 1e-3,
    }
    complete, cut = without_last_checkpoint(corpus, tmp_path, **settings)
    run(corpus, cut, resume=True, **settings)
    assert_same_run(complete, cut, steps=6)
    for changed in ({"mlm_probability_end": None}, {"cautious_decay": False}, {"z_loss": 0.0}):
        other = tmp_path / next(iter(changed))
        run(corpus, other, **{**settings, **changed})
        assert [loss for _, loss, _ in losses(other)] != [loss for _, loss, _ in losses(complete)], changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlm_probability_end": 0.2}, "--mlm-probability-end must be above 0 and at most --mlm-probability, 0.15"),
        ({"mlm_probability_end": 0.1, "whole_word": True}, "leave out --whole-word"),
        ({"cautious_decay": True, "optimizer": "lamb"}, "--cautious-decay is not possible with --optimizer lamb"),
        ({"z_loss": -1.0}, "--z-loss must be 0 or more"),
    ],
)
def test_options_that_do_not_go_together(corpus: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "out", steps=1, **settings)


# Holds step 4 until the signal has come, however slow the machine is.
WAITS_IN_STEP_4 = """
import signal, time
from fusebert.train.cli import main
from fusebert.train.step.step import TrainingStep

original, steps = TrainingStep.__call__, [0]

def wait(self, *args, **kwargs):
    steps[0] += 1
    while steps[0] == 4 and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        time.sleep(0.01)
    return original(self, *args, **kwargs)

TrainingStep.__call__ = wait
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, steps = tmp_path / "interrupted", 10
    words = command_line(**SMALL, steps=steps, workers=1, data=corpus, out=out)
    command = [sys.executable, "-c", WAITS_IN_STEP_4, *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(losses(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the workers receive it too
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 0), errors
    assert "Traceback" not in errors
    done = len(losses(out))
    assert done == 4
    assert f"stopped after step {done}, saved in {out}/checkpoints/step-{done:08d}" in errors
    resume = errors.strip().splitlines()[-1]
    assert resume.startswith("fusebert pretrain ")
    assert resume.endswith(" --resume")
    assert not (out / "hf").exists()

    run(corpus, out, steps=steps, resume=True)
    run(corpus, tmp_path / "straight", steps=steps)
    assert_same_run(tmp_path / "straight", out, steps)


def test_the_second_signal_stops_at_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[Any] = []
    original = TrainingStep.__call__

    def interrupt(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        handled.append(signal.getsignal(signal.SIGINT))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"(?s)stopped after step 1, .*RESUME"):
        run(corpus, tmp_path / "run", steps=5)
    assert handled == [signal.SIG_DFL]  # a second signal ends the process
    assert signal.getsignal(signal.SIGINT) == before


def test_minutes_end_on_time_with_the_rate_at_zero(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake clock: a step takes one second, later two, and `FINISH_SECONDS` of 60 seconds are kept for the end."""
    now = [0.0]

    class FakeTime:
        perf_counter = staticmethod(lambda: now[0])

    original = TrainingStep.__call__
    rates: list[tuple[float, float]] = []

    def slow(self: TrainingStep, window: Any, lr: float, **kwargs: Any) -> Any:
        rates.append((now[0], lr))
        now[0] += 1.0 if now[0] < 30 else 2.0
        return original(self, window, lr, **kwargs)

    for module in (clock, stopwatch):
        monkeypatch.setattr(module, "time", FakeTime)
    monkeypatch.setattr(setup, "matmul_rate", lambda device, dtype: 1e12)  # it measures time
    monkeypatch.setattr(TrainingStep, "__call__", slow)
    settings = {"minutes": 1.0, "lr": 1e-3, "eval_every": None}
    report = run(corpus, tmp_path / "run", **settings)
    usable = 60 - clock.FINISH_SECONDS
    assert usable - 2 <= report.seconds <= usable
    assert report.steps == len(rates) == 30 + (usable - 30) // 2
    assert rates[-1][1] < 0.05 * 1e-3
    peak_at = max(rates, key=lambda pair: pair[1])[0]
    assert peak_at == pytest.approx(0.1 * usable, abs=1.5)
    assert len(records(tmp_path / "run", "eval")) == 11

    # A complete run does not train further; with more minutes it continues.
    assert run(corpus, tmp_path / "run", resume=True, **settings).steps == report.steps
    now[0] += 1000.0  # time between sessions does not count
    longer = run(corpus, tmp_path / "run", resume=True, **{**settings, "minutes": 1.2})
    assert report.steps + 5 <= longer.steps <= report.steps + 7


def test_a_run_that_diverges_is_stopped_at_the_next_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingStep.__call__
    steps = [0]

    def poison(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 5:
            next(self.model.parameters()).data.fill_(float("nan"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", poison)
    with pytest.raises(UserError, match=r"blown up by step 8 .*last good checkpoint is .*step-00000004"):
        run(corpus, tmp_path / "run", steps=10, save_every=4)
    assert checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000004").step == 4


def test_a_full_disk_leaves_the_last_checkpoint(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = safetensors.torch.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*good checkpoint is .*step-00000002.*RESUME") as caught:
        run(corpus, tmp_path / "run", steps=10, save_every=2)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_checkpoints_found_damaged(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run(corpus, out, steps=4, save_every=2)
    newest, older = checkpoint.list_checkpoints(out / "checkpoints")
    (newest / "optimizer.safetensors").write_bytes(b"")
    assert run(corpus, out, steps=4, save_every=2, resume=True).steps == 4
    assert "step-00000004/optimizer.safetensors is damaged" in capsys.readouterr().err
    for path in (newest, older):
        content = json.loads((path / "trainer.json").read_text())
        content["version"] = 2  # without a checksum
        content["state"]["batches"] += 1
        (path / "trainer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"all checkpoints .* are damaged"):
        run(corpus, out, steps=4, resume=True)


def test_a_finished_run_appends_nothing(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(corpus, out, steps=2)
    before = {name: (out / name).read_bytes() for name in ("log.jsonl", "hf/model.safetensors")}
    (out / "hf" / "model.safetensors").unlink()
    again = run(corpus, out, steps=2, resume=True)
    assert again.after == first.after
    assert before == {name: (out / name).read_bytes() for name in before}
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_dead_worker_saves_first(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in step 3, in which nothing may be raised."""
    original, steps = TrainingStep.__call__, [0]

    def step(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            for worker in multiprocessing.active_children():
                worker.kill()
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # not reaped
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"makes batches has died .*; saved in .*step-\d+; go on with: RESUME"):
        run(corpus, out, steps=5000, workers=1)
    (path,) = checkpoint.list_checkpoints(out / "checkpoints")
    assert checkpoint.read_state(path).step == len(losses(out)) >= 3


def test_options_that_a_continued_run_cannot_change(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(corpus, out, steps=2)
    with pytest.raises(UserError, match=r"already holds a run .*--resume.*another --out"):
        run(corpus, out, steps=4)
    other = make_corpus(tmp_path, seed=1)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--model .*hidden_size 128 there, 256 here", {"model": "mini"}),
        ("--seed .*0 there, 3 here", {"seed": 3}),
        ("--batch-tokens .*256 there, 512 here", {"batch_tokens": 512}),
        ("--data ", {"data": other}),
    ]
    for message, change in changes:
        settings = PretrainSettings(**{"data": corpus, "out": out, "steps": 4, "resume": True, **SMALL, **change})
        with pytest.raises(UserError, match=message):
            pretrain(settings, resume_command="RESUME")
    # The learning rate and the length may change.
    assert run(corpus, out, steps=3, lr=1e-5, resume=True).steps == 3


def test_starting_from_a_hugging_face_folder(corpus: Path, tmp_path: Path) -> None:
    first = run(corpus, tmp_path / "first", steps=20, lr=2e-3)
    settings = {"model": "auto", "init_from": tmp_path / "first" / "hf", "steps": 1, "lr": 1e-9}
    second = run(corpus, tmp_path / "second", **settings)
    assert second.before.mlm_loss == pytest.approx(first.after.mlm_loss, rel=1e-5)

    torch.manual_seed(0)
    wrong = BertForPreTraining(BertConfig.preset("tiny", 300))
    save_hf(wrong, tmp_path / "wrong", None)
    with pytest.raises(UserError, match=r"vocabulary of 300 tokens.*one of \d+"):
        run(corpus, tmp_path / "third", **{**settings, "init_from": tmp_path / "wrong"})

    tokenizer = json.loads((tmp_path / "first" / "hf" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["fox"], vocab["owl"] = vocab["owl"], vocab["fox"]
    (tmp_path / "first" / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"another vocabulary .* of the same size"):
        run(corpus, tmp_path / "fourth", **settings)


def test_full_sentences_have_no_next_sentence_figures(corpus: Path, tmp_path: Path) -> None:
    report = run(corpus, tmp_path / "run", steps=2, nsp=False, whole_word=True, precision="bf16")
    assert report.after.nsp_accuracy is None
    assert report.after.num_pairs == 0
    assert "NSP" not in report.as_text()


def test_the_verdict_compares_the_loss_with_the_unigram_entropy() -> None:
    fields: dict[str, Any] = {f.name: None for f in dataclasses.fields(Report)}
    for before, best, loss, words in (
        (9.0, 5.6, 5.6, "clearly below"),
        (9.0, 5.9, 5.9, "just below"),
        (9.0, 6.1, 6.1, "NOT below"),
        (9.0, 9.0, 9.5, "ABOVE the loss before training, 9.000: the run has diverged; lower --lr"),
        (9.0, 4.0, 8.8, "far above the best evaluation's, 4.000: the run has diverged; lower --lr"),
        (9.0, 4.0, 5.0, "far above the best evaluation's"),
        (9.0, 5.5, 5.6, "clearly below"),
    ):
        evaluations = {"before": Evaluation(before, 0.1, None, None, 10, 0), "best_loss": best}
        evaluations["after"] = Evaluation(loss, 0.1, None, None, 10, 0)
        verdict = Report(**{**fields, "steps": 9, "unigram_entropy": 6.0, **evaluations}).verdict()
        assert verdict.startswith(words)
        assert ("train longer" in verdict) == words.startswith(("just", "NOT"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_the_gpu(corpus: Path, tmp_path: Path) -> None:
    settings = {"steps": 100, "tokens_per_batch": 512, "lr": 4e-3, "dropout": 0.0, "device": "cuda", "threads": None}
    settings["workers"] = 2
    report = run(corpus, tmp_path / "run", **settings)
    assert report.precision == "bf16"
    assert report.after.mlm_loss < 0.85 * report.unigram_entropy
