"""A finished pretraining run becomes a result file."""

import json
import os

import bench_results as made
import pytest
import torch
from small_corpus import make_corpus

from fusebert.bench.measure.result import result_json
from fusebert.bench.report.record import record
from fusebert.train.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def finished(tmp_path, corpus):
    """What fusebert pretrain leaves, of it what is read; and a folder of sources older than it."""
    run, sources = tmp_path / "run", tmp_path / "sources"
    run.mkdir()
    for name in ("kernels", "model", "train"):
        (sources / name).mkdir(parents=True)
        (sources / name / "x.py").write_text("")
        os.utime(sources / name / "x.py", (1, 1))
    begin = {
        "kind": "run",
        "step": 0,
        "settings": {"data": str(corpus), "out": str(run), "model": "tiny", "threads": None},
        "shape": {"tokens": 512},
        "torch": torch.__version__,
        "device": "CPU (7 threads)",
    }
    (run / "log.jsonl").write_text(json.dumps(begin) + "\n" + json.dumps({"kind": "train", "step": 1}) + "\n")
    report = {**made.pretrain()["report"], "hf_directory": str(run / "hf"), "loss_curve": str(run / "loss.png")}
    (run / "report.json").write_text(json.dumps(report))
    return run, sources


def test_record_keeps_figures_and_where_they_are_from(finished):
    run, sources = finished
    result = record(run, sources)
    assert result.report.after.mlm_loss == 4.689
    assert result.environment.versions["torch"] == torch.__version__
    assert result.environment.device == "cpu"
    assert result.environment.torch_threads == 7
    assert result.corpus.vocab_size == 240
    assert result.corpus.train_tokens > 1000
    assert str(run.parent) not in json.dumps(result_json(result))  # no place on this machine


@pytest.mark.parametrize(("device", "threads"), [("CPU (1 thread)", 1), ("2 × CPU (1 thread), DDP", 2)])
def test_record_counts_the_threads_of_all_processes(finished, device, threads):
    run, sources = finished
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log.replace("CPU (7 threads)", device), encoding="utf-8")
    result = record(run, sources)
    assert (result.environment.device, result.environment.torch_threads) == ("cpu", threads)


def test_record_refuses_what_these_sources_did_not_give(finished):
    run, sources = finished
    os.utime(sources / "train" / "x.py", (2**32, 2**32))
    with pytest.raises(UserError, match="was changed after this run"):
        record(run, sources)


def test_record_refuses_another_pytorch(finished):
    run, sources = finished
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log.replace(torch.__version__, "0.0.1"))
    with pytest.raises(UserError, match=r"ran with PyTorch 0\.0\.1"):
        record(run, sources)


@pytest.mark.parametrize("name", ["report.json", "log.jsonl"])
def test_record_refuses_a_run_that_is_not_finished(finished, name):
    run, sources = finished
    (run / name).unlink()
    with pytest.raises(UserError, match="give the folder of"):
        record(run, sources)
