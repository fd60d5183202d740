"""Losses, gradients and weights that are not finite: skipped, counted, never saved as good."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, records
from safetensors.torch import load_file, save_file
from small_corpus import make_corpus

from fusebert.model.hf import from_hf
from fusebert.train.errors import UserError
from fusebert.train.run import checkpoint, loop
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.replay import load_window
from fusebert.train.run.report import Report
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.optim import make_optimizer
from fusebert.train.step.step import TrainingStep


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus: Path, out: Path, **settings: Any) -> Report | None:
    return pretrain(PretrainSettings(data=corpus, out=out, **{**SMALL, **settings}), resume_command="RESUME")


def strict(text: str) -> Any:
    """The content of a JSON text, in which Python's NaN and Infinity are errors."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], also_weights: bool = False) -> None:
    """In these steps one weight is NaN; afterwards it has its value again, unless ``also_weights``."""
    original, count = TrainingStep.__call__, [0]

    def step(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] not in steps:
            return original(self, *args, **kwargs)
        weight = next(self.model.parameters()).data.view(-1)
        kept = weight[7].item()
        weight[7] = float("nan")
        result = original(self, *args, **kwargs)
        if not also_weights:
            weight[7] = kept
        return result

    monkeypatch.setattr(TrainingStep, "__call__", step)


def fingerprint(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}


def test_a_rate_that_blows_the_weights_up_leaves_no_model(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held-out loss after step 1 is not finite.*there is no good checkpoint"):
        run(corpus, tmp_path / "run", steps=1, lr=1e38)
    assert not (tmp_path / "run" / "hf").exists()
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_blown_up_weights_are_not_saved(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {4}, also_weights=True)
    with pytest.raises(UserError, match=r"blown up by step 4 \(.* is not finite.*good checkpoint is .*step-00000003"):
        run(corpus, tmp_path / "run", steps=9, save_every=1)
    assert not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_bad_step_is_skipped_and_counted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    poison(monkeypatch, {3, 5, 6})
    out = tmp_path / "run"
    run(corpus, out, steps=8, save_every=2, optimizer=optimizer)
    assert [(r["step"], r["in_a_row"]) for r in records(out, "skip")] == [(3, 1), (5, 1), (6, 2)]
    losses = {r["step"]: r["mlm_loss"] for r in records(out, "train")}
    assert [step for step, loss in losses.items() if loss is None] == [3, 5, 6]
    newest, before = checkpoint.list_checkpoints(out / "checkpoints")
    assert checkpoint.read_state(newest).skipped == 3
    moments = load_file(newest / "optimizer.safetensors")
    assert float(moments["mlm_bias/step"]) == 5
    for name, value in load_file(before / "optimizer.safetensors").items():  # step 6, which was skipped
        assert torch.isfinite(value).all(), name
    assert "step      3: loss or gradient is not finite: skipped" in capsys.readouterr().out
    assert [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert strict((out / "report.json").read_text())["steps"] == 8


def test_many_in_a_row_end_the_run_and_can_be_repeated(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has the weights of the first bad step, and the file its batch."""
    monkeypatch.setattr(loop, "MAX_SKIPS", 3)
    poison(monkeypatch, {4, 5, 6})
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, from step 4 on.*good checkpoint is .*00006"):
        run(corpus, out, steps=10)
    (file,) = (out / "nonfinite").iterdir()
    assert file.name == "step-00000004.rank-0.safetensors"
    monkeypatch.undo()

    straight = tmp_path / "straight"
    run(corpus, straight, steps=10)
    expected = {r["step"]: r for r in records(straight, "train")}[4]
    window, seeds = load_window(file)
    model = from_hf(straight / "hf")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    checkpoint.load_checkpoint(out / "checkpoints" / "step-00000006", model, make_optimizer(model, 1e-3, 0.01))
    step = TrainingStep(model, make_optimizer(model, 1e-3, 0.01), clip=1.0, compute_dtype=torch.float32)
    result = step(window, 0.0, seeds=seeds)
    assert float(result.sums[0]) / window[0].num_masked == pytest.approx(expected["mlm_loss"], rel=0.05)


def test_resume_takes_the_last_good_checkpoint(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint with NaN and matching checksums, as earlier versions wrote it."""
    out = tmp_path / "run"
    run(corpus, out, steps=4, save_every=2)
    newest, older = checkpoint.list_checkpoints(out / "checkpoints")
    weights = load_file(newest / "model.safetensors")
    weights["mlm_bias"][3] = float("inf")
    save_file(weights, newest / "model.safetensors")
    content = json.loads((newest / "trainer.json").read_text())
    content["files"]["model.safetensors"] = fingerprint(newest / "model.safetensors")
    content["version"] = 2
    content.pop("checksum", None)
    (newest / "trainer.json").write_text(json.dumps(content))
    assert checkpoint.last_good(out / "checkpoints") == f"the last good checkpoint is {older}"
    run(corpus, out, steps=4, resume=True)
    assert "mlm_bias is not finite" in capsys.readouterr().err
    assert checkpoint.read_state(newest).step == 4


def test_a_start_that_is_not_finite_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "first", steps=1)
    path = tmp_path / "first" / "hf" / "model.safetensors"
    weights = load_file(path)
    weights["bert.pooler.dense.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--init-from .*: pooler.bias is not finite"):
        run(corpus, tmp_path / "second", steps=1, model="auto", init_from=tmp_path / "first" / "hf")
    assert not (tmp_path / "second").exists()
