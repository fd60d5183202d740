"""A signal at any moment leads to a saved or never started run, and to an exit within seconds."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import run_jobs
from runs import SMALL, command_line, records, weights
from small_corpus import make_corpus

from fusebert.train.run import checkpoint
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.run.signals import Interrupted
from fusebert.train.step.step import TrainingStep

STEPS = 4
# Moment, signal, whether a checkpoint is expected; None: the run may also have finished.
MOMENTS: list[tuple[str, signal.Signals, bool | None]] = [
    ("corpus", signal.SIGINT, False),
    ("matmul", signal.SIGTERM, False),
    ("workers/1", signal.SIGINT, False),
    ("workers/2", signal.SIGTERM, False),
    ("chunk", signal.SIGTERM, None),  # in a worker
    ("first batch", signal.SIGUSR1, False),
    ("step/1", signal.SIGINT, True),
    ("step/2", signal.SIGUSR1, True),
    ("save", signal.SIGTERM, True),
    ("export", signal.SIGINT, None),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The results of a run for each moment, by the moment, and "twice"."""
    place = tmp_path_factory.mktemp("signals")
    jobs = [{"at": at, "signal": int(number)} for at, number, _ in MOMENTS]
    jobs.append({"at": "step/3", "signal": int(signal.SIGTERM), "twice": True})
    for i, job in enumerate(jobs):
        job["words"] = command_line(**SMALL, steps=STEPS, save_every=2, workers=2, data=corpus, out=place / f"run{i}")
    made = run_jobs(jobs, place)
    names = [*(at for at, _, _ in MOMENTS), "twice"]
    return {name: (place / f"run{i}", result) for i, (name, result) in enumerate(zip(names, made, strict=True))}


@pytest.mark.parametrize(("at", "number", "saved"), MOMENTS)
def test_a_signal_at_any_moment(
    results: dict[str, tuple[Path, dict[str, Any]]],
    corpus: Path,
    tmp_path: Path,
    at: str,
    number: signal.Signals,
    saved: bool | None,
) -> None:
    out, result = results[at]
    assert result["sent"], result
    assert result["ended"], result
    assert result["left"] == 0, result
    assert "Traceback" not in result["output"]
    found = checkpoint.list_checkpoints(out / "checkpoints")
    if saved is not None:
        assert bool(found) == saved, result
    finished = (out / "report.json").exists()
    assert result["status"] == (130 if number == signal.SIGINT and not finished else 0), result
    assert ("stopped after step" if found else "stopped before the first step") in result["output"] or finished
    if found and not finished:
        done = checkpoint.read_state(found[0]).step
        assert f"saved in {found[0]}; go on with:\nfusebert pretrain " in result["output"]
        assert done == max(r["step"] for r in records(out, "train"))


def test_a_stopped_run_goes_on_to_the_same_bits(results: dict[str, tuple[Path, dict[str, Any]]], corpus: Path) -> None:
    out, _ = results["step/2"]
    for folder in (out, out.parent / "straight"):
        settings = PretrainSettings(data=corpus, out=folder, resume=True, **{**SMALL, "steps": STEPS})
        pretrain(settings, resume_command="RESUME")
    ours, theirs = weights(out, STEPS), weights(out.parent / "straight", STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_second_signal_stops_at_once(results: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, result = results["twice"]
    assert result["status"] == -signal.SIGTERM
    assert result["left"] == 0
    assert [checkpoint.read_state(path).step for path in checkpoint.list_checkpoints(out / "checkpoints")] == [2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_an_evaluation_is_broken_off(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    """The one after the last step: it was not done, so the run is not finished."""
    original, steps = TrainingStep.__call__, [0]

    def step(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    settings = PretrainSettings(data=corpus, out=tmp_path, **{**SMALL, "steps": 2})
    with pytest.raises(Interrupted, match="stopped after step 2") as stopped:
        pretrain(settings, resume_command="RESUME")
    assert stopped.value.status == status
    (path,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert json.loads((path / "trainer.json").read_text())["state"]["finished"] is False
