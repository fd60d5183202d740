"""`fusebert pretrain` in several processes that it starts itself: the same run, signals, failures."""

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import run_jobs
from runs import SMALL, command_line, records, weights
from small_corpus import make_corpus

from fusebert.train.errors import UserError
from fusebert.train.run import checkpoint
from fusebert.train.run.manifest import read_manifest
from fusebert.train.run.plan import resolve, with_processes
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.distributed import Ranks

STEPS = 6
Results = dict[str, tuple[Path, dict[str, Any]]]
RUN = {**SMALL, "steps": STEPS, "save_every": 2, "batch_tokens": 512}
JOBS: dict[str, dict[str, Any]] = {
    "whole": {"at": "never"},
    "corpus": {"at": "corpus", "signal": signal.SIGTERM, "to": "group"},
    "group": {"at": "step/3", "signal": signal.SIGINT, "to": "group"},
    "parent": {"at": "step/3", "signal": signal.SIGTERM, "to": "parent"},
    "all": {"at": "step/3", "signal": signal.SIGUSR1, "to": "all"},
    "twice": {"at": "step/4", "signal": signal.SIGTERM, "to": "parent", "twice": True},
    "rank killed": {"at": "step/4", "signal": signal.SIGKILL, "to": "rank 1"},
    "parent killed": {"at": "step/4", "signal": signal.SIGKILL, "to": "parent"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    place = tmp_path_factory.mktemp("ranks")
    outs = {name: place / name.replace(" ", "-") for name in JOBS}
    jobs = [
        {**job, "words": command_line(**RUN, processes=2, data=corpus, out=outs[name])} for name, job in JOBS.items()
    ]
    # With nothing but --resume: the number of processes is that of the run.
    jobs.append({"at": "never", "words": ["pretrain", f"--data={corpus}", f"--out={outs['group']}", "--resume"]})
    outs["continued"] = outs["group"]
    made = run_jobs(jobs, place)
    return dict(zip(outs, zip(outs.values(), made, strict=True), strict=True))


def test_the_run_is_that_of_one_process(results: Results, corpus: Path, tmp_path: Path) -> None:
    """Two micro-batches a step, one in each process. The sum of two gradients has one order."""
    out, result = results["whole"]
    assert (result["status"], result["left"]) == (0, 0), result
    pretrain(PretrainSettings(data=corpus, out=tmp_path, **RUN), resume_command="RESUME")
    ours, theirs = weights(out, STEPS), weights(tmp_path, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    manifest = read_manifest(out)
    assert (manifest["ranks"], manifest["settings"]["processes"], manifest["threads"]) == (2, 2, 1)
    assert "2 × CPU (1 thread)" in (out / "report.md").read_text()
    assert result["output"].count("held-out MLM loss") == result["output"].count("step ")  # printed once


@pytest.mark.parametrize("name", ["group", "parent", "all"])
def test_a_signal_saves_and_ends_all(results: Results, name: str) -> None:
    out, result = results[name]
    assert result["ended"], result
    assert result["left"] == 0, result
    assert result["status"] == (130 if name == "group" else 0), result
    pattern = rf"stopped after step ([345]), saved in {out}/checkpoints/step-0000000\1; go on with:\nfusebert pretrain "
    assert re.search(pattern, result["output"]), result
    assert "finishing the step, then saving" in result["output"]
    assert "Traceback" not in result["output"]
    assert "error" not in result["output"]


def test_a_continued_run_has_the_same_bits(results: Results) -> None:
    out, result = results["continued"]
    assert result["status"] == 0, result
    ours, theirs = weights(out, STEPS), weights(results["whole"][0], STEPS)
    assert all(torch.equal(ours[each], theirs[each]) for each in theirs)
    assert [record["ranks"] for record in records(out, "run")] == [2, 2]


def test_a_signal_before_the_first_step(results: Results) -> None:
    out, result = results["corpus"]
    assert (result["status"], result["left"]) == (0, 0), result
    assert result["output"].count("stopped before the first step") == 1
    assert "error" not in result["output"]
    assert not (out / "checkpoints").exists()


def test_the_second_signal_stops_at_once(results: Results) -> None:
    out, result = results["twice"]
    assert result["status"] == -signal.SIGTERM, result
    assert result["left"] == 0
    assert [checkpoint.read_state(path).step for path in checkpoint.list_checkpoints(out / "checkpoints")] == [2]


def test_a_process_that_is_killed_ends_the_others(results: Results) -> None:
    out, result = results["rank killed"]
    assert result["ended"], result
    assert result["left"] == 0
    assert result["status"] == 128 + signal.SIGKILL, result
    assert result["output"].count("fusebert: error: another process of the job has ended") == 1
    assert "Traceback" not in result["output"]
    assert checkpoint.read_state(out / "checkpoints" / "step-00000002").step == 2


def test_no_process_survives_the_parent(results: Results) -> None:
    out, result = results["parent killed"]
    assert (result["status"], result["left"]) == (-signal.SIGKILL, 0), result
    assert not (out / "report.json").exists()  # they have not gone on to the end


def test_a_process_never_returns_to_the_caller() -> None:
    script = (
        "import os, sys\n"
        "from fusebert.train.run.local_ranks import start_ranks\n"
        "statuses = [start_ranks(2, lambda: sys.exit(3 * int(os.environ['RANK']))), start_ranks(2, lambda: None)]\n"
        "print(statuses, 'RANK' in os.environ)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[3, 0] False\n"


@pytest.mark.parametrize(
    ("cores", "given", "processes", "threads"),
    [
        (2, {}, 2, 1),
        (8, {}, 4, 2),  # of 2,048 tokens, so that each has 4 segments
        (8, {"seqlen": 64}, 8, 1),
        (3, {}, 2, 1),
        (4, {"batch_tokens": 8192}, 4, 1),
        (4, {"batch_tokens": 8192, "tokens_per_batch": 4096}, 2, 2),
        (4, {"tokens_per_batch": 4096}, 1, 4),
        (4, {"model": "mini"}, 4, 1),
        (4, {"model": "small"}, 1, 4),
        (4, {"model": "base"}, 1, 4),
        (4, {"processes": 1}, 1, 4),
        (4, {"processes": 2, "threads": 3}, 2, 3),
        (4, {"threads": 2}, 1, 2),
    ],
)
def test_as_many_as_pay(
    monkeypatch: pytest.MonkeyPatch, cores: int, given: dict[str, Any], processes: int, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    settings = PretrainSettings(data=Path("data"), out=Path("out"), steps=1, device="cpu", **given)
    chosen = with_processes(settings)
    assert (chosen.processes, chosen.threads) == (processes, threads)
    plan = resolve(chosen, Ranks(0, processes, 0, processes))
    assert plan.batch_tokens == (settings.batch_tokens or settings.tokens_per_batch or 2048)  # however many there are


def test_a_job_of_torchrun_has_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PretrainSettings(data=Path("data"), out=Path("out"), steps=1, device="cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert with_processes(settings) == settings
    with pytest.raises(UserError, match="--processes 2, but there are 4"):
        resolve(dataclasses.replace(settings, processes=2), Ranks(0, 4, 0, 4))
