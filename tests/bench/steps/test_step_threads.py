"""fusebert bench step on a CPU: each contestant with the number of threads that suits it best."""

import time

import pytest
import torch
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.result import StepResult, read_result
from fusebert.bench.steps import step as module


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_the_quickest_number_is_found(monkeypatch: pytest.MonkeyPatch, most: int, tried: list[int]) -> None:
    threads = [most]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    best = tried[-2:][0]
    assert module.best_threads(lambda i: time.sleep(0.001 if threads[-1] == best else 0.01)) == best
    assert threads[1:] == [*tried, most]


def test_the_result_names_them(tmp_path) -> None:
    before = torch.get_num_threads()
    words = ["step", "--model", "tiny", "--tokens", "256", "--seqlen", "32", "--vocab-size", "100", "--quick"]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--out", str(tmp_path / "s.json")])
    assert done.exit_code == 0, done.output
    rows = read_result(tmp_path / "s.json", StepResult).contestants
    assert {row.name for row in rows} == {"fusebert", "transformers", "transformers, masked rows only"}
    assert all(1 <= row.time.threads <= before for row in rows)
    assert torch.get_num_threads() == before
    assert "threads" in done.output
