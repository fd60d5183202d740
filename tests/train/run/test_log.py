"""The log: appended line by line, cut back to the step that a run continues from, copied to TensorBoard."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fusebert.train.run.log import RunLog, read_log


def test_resuming_removes_later_records(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resume_step=None, tensorboard=False)
    for step in (0, 1, 2, 3):
        log.write("train", step, mlm_loss=float(step))
    log.close()
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 4, "mlm_')  # cut short by a crash
    RunLog(tmp_path, resume_step=2, tensorboard=False).write("eval", 2, mlm_loss=5.0)
    records = read_log(tmp_path / "log.jsonl")
    assert [(r["kind"], r["step"], r["mlm_loss"]) for r in records] == [
        ("train", 0, 0.0),
        ("train", 1, 1.0),
        ("train", 2, 2.0),
        ("eval", 2, 5.0),
    ]
    RunLog(tmp_path, resume_step=None, tensorboard=False).close()
    assert read_log(tmp_path / "log.jsonl") == []
    assert read_log(tmp_path / "nowhere") == []


def test_numbers_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int | None) -> None:
            written.append((directory, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            written.append(scalar)

        def close(self) -> None:
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = RunLog(tmp_path, resume_step=6, tensorboard=None)
    log.write("train", 7, mlm_loss=5.5, nsp_loss=None, note="words")
    log.close()
    assert written == [(str(tmp_path / "tensorboard"), 7), ("train/mlm_loss", 5.5, 7), "closed"]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    RunLog(tmp_path, resume_step=None, tensorboard=None).write("train", 1, mlm_loss=1.0)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        RunLog(tmp_path, resume_step=None, tensorboard=True)
