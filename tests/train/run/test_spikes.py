"""Spikes of the training loss: found once each, in sequences and in a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import SMALL, records
from small_corpus import make_corpus

from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.run.spikes import FEWEST, Spikes
from fusebert.train.step.step import StepResult, TrainingStep


def falling(lines: int, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Losses from 9 down to 2, with normal noise."""
    level = 2.0 + 7.0 * np.exp(-np.arange(lines) / 60.0)
    return level * (1.0 + noise * np.random.default_rng(seed).standard_normal(lines))


def found(losses: np.ndarray) -> list[int]:
    spikes = Spikes()
    return [i for i, loss in enumerate(losses) if spikes.add(float(loss)) is not None]


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.05])
def test_noise_is_no_spike(noise: float) -> None:
    assert [found(falling(2000, noise, seed)) for seed in range(3)] == [[], [], []]


@pytest.mark.parametrize("lines", [1, 5, 500])
def test_a_spike_is_found_once(lines: int) -> None:
    """However long it lasts: a loss that stays high becomes the level."""
    losses = falling(1200)
    losses[400 : 400 + lines] *= 2.0
    assert found(losses) == [400]


def test_a_second_spike_is_found_too() -> None:
    losses = falling(600)
    losses[[300, 310, 311, 500]] += 3.0
    assert found(losses) == [300, 310, 500]


def test_the_first_lines_have_no_level() -> None:
    losses = np.full(FEWEST, 5.0)
    losses[-1] = 50.0
    assert found(losses) == []
    assert found(np.append(np.full(FEWEST, 5.0), 50.0)) == [FEWEST]


def test_a_run_reports_its_spikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two, one of them in the continued run, where the level is that of the log."""
    original, calls = TrainingStep.__call__, []

    def step(self: TrainingStep, *args: Any, **kwargs: Any) -> StepResult:
        calls.append(None)
        result = original(self, *args, **kwargs)
        if len(calls) in (18, 22):
            result.sums.copy_(torch.where(torch.arange(4) == 0, 3.0 * result.sums, result.sums))
        return result

    monkeypatch.setattr(TrainingStep, "__call__", step)
    settings = {**SMALL, "data": make_corpus(tmp_path), "out": tmp_path / "run"}
    assert pretrain(PretrainSettings(**settings, steps=20), "RESUME").spikes == 1
    report = pretrain(PretrainSettings(**settings, steps=23, resume=True), "RESUME")
    assert report.spikes == 2
    assert [r["step"] for r in records(tmp_path / "run", "spike")] == [18, 22]
    assert all(r["mlm_loss"] > r["limit"] > r["level"] for r in records(tmp_path / "run", "spike"))
    assert capsys.readouterr().err.count("far above its recent level") == 2
    assert "Spikes of the training loss: 2" in (tmp_path / "run" / "report.md").read_text()
