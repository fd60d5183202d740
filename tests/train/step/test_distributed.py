"""Several processes give the losses and weights of a single process on the same global batches, and a run continues
with any number of processes. Over gloo, on the CPU."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from ranks import pretrain_in, skew_clocks
from runs import records, weights
from safetensors.torch import load_file
from small_corpus import make_corpus

from fusebert.train.errors import UserError
from fusebert.train.run.checkpoint import TrainerState
from fusebert.train.run.loop import dropout_seed
from fusebert.train.run.phases import Phase
from fusebert.train.run.plan import resolve
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.resume import keep_batch_sizes
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.distributed import Ranks

SMALL = {**runs.SMALL, "eval_every": 3}
# With dropout. A step is two micro-batches, or four, so that four processes can continue it.
TWO = {"batch_tokens": 512, "steps": 4, "ema": 0.9}
GROWING = {"batch_tokens": "512:0.5,1024", "steps": 4}
FOUR = {"batch_tokens": 1024, "steps": 6, "save_every": 3}
REL = 1e-6  # of a loss, where gradients are summed in another order


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, named by their processes; "1 to 2" was continued by two processes after its third step."""
    place = tmp_path_factory.mktemp("runs")

    def job(name: str, **settings: Any) -> dict[str, Any]:
        return {**SMALL, "data": corpus, "out": place / name, **settings}

    def go_on(name: str, before: str, **settings: Any) -> dict[str, Any]:
        shutil.copytree(place / before, place / name)
        shutil.rmtree(place / name / "checkpoints" / "step-00000006")
        return job(name, resume=True, **settings)

    def alone(*jobs: dict[str, Any]) -> None:
        for each in jobs:
            pretrain(PretrainSettings(**each), resume_command="RESUME")

    threads = torch.get_num_threads()
    alone(job("two, 1", **TWO), job("growing, 1", **GROWING), job("1", **FOUR))
    pretrain_in(
        2,
        [
            job("two, 2", **TWO, workers=2),
            job("growing, 2", **GROWING),
            job("2 ddp", **FOUR),
            job("2 fsdp", **FOUR, parallel="fsdp"),
            # Without batch sizes: those of the continued run are used.
            go_on("1 to 2", "1", **{k: v for k, v in FOUR.items() if k != "batch_tokens"}, tokens_per_batch=None),
            go_on("1 to 2 fsdp", "1", **FOUR, parallel="fsdp"),
        ],
    )
    pretrain_in(4, [go_on("2 to 4 fsdp", "2 fsdp", **FOUR, parallel="fsdp")])
    alone(go_on("2 to 1", "2 ddp", **FOUR), go_on("2 fsdp to 1", "2 fsdp", **FOUR))
    torch.set_num_threads(threads)
    return place


def losses(out: Path) -> list[tuple[float, ...]]:
    return [(r["step"], r["mlm_loss"], r["nsp_loss"], r["mlm_accuracy"], r["tokens"]) for r in records(out, "train")]


def test_two_processes_are_one_to_the_bit(made: Path) -> None:
    """Two with one micro-batch each, and one with both: the sum is g₁ + g₂ either way, with the same dropout masks."""
    one, two = made / "two, 1", made / "two, 2"
    assert len(losses(one)) == 4
    assert losses(one) == losses(two)
    assert [r["grad_norm"] for r in records(one, "train")] == [r["grad_norm"] for r in records(two, "train")]
    for name in ("model", "optimizer"):
        ours, theirs = weights(one, 4, name), weights(two, 4, name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert any(key.endswith("/average") for key in ours)


def test_two_processes_grow_their_steps_as_one(made: Path) -> None:
    one, two = made / "growing, 1", made / "growing, 2"
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert theirs == pytest.approx(ours, rel=REL)
    for name in (one, two):
        state = json.loads((name / "checkpoints" / "step-00000004" / "trainer.json").read_text())["state"]
        assert (state["batches"], state["step_sizes"]) == (2 * 2 + 2 * 4, [2])
    # The steps of one micro-batch a process are the same to the bit.
    assert [r["grad_norm"] for r in records(one, "train")][:2] == [r["grad_norm"] for r in records(two, "train")][:2]


def test_two_processes_evaluate_and_export_one_average(made: Path) -> None:
    one, two = made / "two, 1", made / "two, 2"
    exported, same = (load_file(each / "hf" / "model.safetensors") for each in (one, two))
    assert [key for key in exported if not torch.equal(exported[key], same[key])] == []
    name = "encoder.embeddings.word_embeddings.weight"
    found = exported["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(found, weights(two, 4, "optimizer")[f"{name}/average"])
    assert not torch.equal(found, weights(two, 4)[name])
    assert [r["step"] for r in records(two, "eval")] == [0, 3, 4]
    for ours, theirs in zip(records(one, "eval"), records(two, "eval"), strict=True):
        assert theirs["mlm_loss"] == pytest.approx(ours["mlm_loss"], rel=REL)  # summed in another order


@pytest.mark.parametrize("name", ["2 ddp", "2 fsdp", "1 to 2", "1 to 2 fsdp", "2 to 4 fsdp", "2 to 1", "2 fsdp to 1"])
def test_a_run_is_the_same_on_any_number_of_processes(made: Path, name: str) -> None:
    one, other = made / "1", made / name
    assert [line[0] for line in losses(other)] == list(range(1, 7))
    for ours, theirs in zip(losses(one), losses(other), strict=True):
        assert theirs == pytest.approx(ours, rel=REL)
    for ours, theirs in zip(records(one, "eval"), records(other, "eval"), strict=True):
        for field in ("mlm_loss", "mlm_accuracy", "nsp_loss", "num_masked", "num_pairs"):
            assert theirs[field] == pytest.approx(ours[field], rel=REL)
    state = json.loads((other / "checkpoints" / "step-00000006" / "trainer.json").read_text())["state"]
    assert state["batches"] == 24
    moments, expected = weights(other, 6, "optimizer"), weights(one, 6, "optimizer")
    assert moments.keys() == expected.keys()
    for key, value in expected.items():
        assert moments[key].shape == value.shape
        assert moments[key].dtype == value.dtype


def test_dropout_differs_between_micro_batches_and_between_seeds() -> None:
    seeds = {dropout_seed(seed, number) for seed in range(3) for number in range(100)}
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 300  # the CPU's generator uses these bits


def test_one_process_writes_and_exports(made: Path) -> None:
    for name in ("2 ddp", "2 fsdp"):
        out = made / name
        assert [r["ranks"] for r in records(out, "run")] == [2]
        assert "2 × CPU" in (out / "report.md").read_text()
        exported = load_file(out / "hf" / "model.safetensors")
        ours = weights(out, 6)["encoder.embeddings.word_embeddings.weight"]
        assert torch.equal(exported["bert.embeddings.word_embeddings.weight"], ours)
        for record in records(out, "train"):
            assert 0 < record["mfu"] < 1


def test_one_clock_decides(corpus: Path, tmp_path: Path) -> None:
    """With minutes, learning rate and end follow rank 0's clock, so that all ranks take the same steps."""
    job = {**SMALL, "data": corpus, "out": tmp_path / "run", "minutes": 0.25, "eval_every": None}
    pretrain_in(2, [job], setup=skew_clocks)
    assert len(records(tmp_path / "run", "train")) == 10  # 15 seconds without FINISH_SECONDS


def torchrun(corpus: Path, out: Path, *words: str, program: tuple[str, ...] = ("-m", "fusebert.train")) -> Any:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    return subprocess.Popen(
        [*command, *runs.command_line(**SMALL, data=corpus, out=out), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_one_process_goes_on(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    process = torchrun(corpus, out, "--steps=3000", "--batch-tokens=512", "--workers=1")
    deadline = time.monotonic() + 120
    while len(losses(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    printed = [line for line in errors.splitlines() if line.startswith("fusebert: ")]
    done = len(losses(out))
    assert printed == [f"fusebert: stopped after step {done}, saved in {out}/checkpoints/step-{done:08d}; go on with:"]
    assert "\ntorchrun --nproc-per-node=2 -m fusebert.train pretrain " in errors
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    settings = PretrainSettings(**{**SMALL, "data": corpus, "out": out, "resume": True, "steps": done + 1})
    assert pretrain(settings, resume_command="RESUME") is not None


FAILS_ON_RANK_1 = """
import os
from fusebert.train.cli import main
from fusebert.train.errors import UserError
from fusebert.train.step.step import TrainingStep

original, steps = TrainingStep.__call__, [0]

def fail(self, *args, **kwargs):
    steps[0] += 1
    if os.environ["RANK"] == "1" and steps[0] == 3:
        raise UserError("the roof leaks")
    return original(self, *args, **kwargs)

TrainingStep.__call__ = fail
main()
"""


def test_a_failing_process_ends_the_job_with_one_error(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ON_RANK_1)
    for words, expected, program in (
        (["--steps=3000", "--workers=1"], "fusebert: error: rank 1: the roof leaks", (str(script),)),
        (["--steps=3000", "--minutes=1"], "say how long to train: ", ("-m", "fusebert.train")),
    ):
        process = torchrun(corpus, tmp_path / "run", *words, program=program)
        _, errors = process.communicate(timeout=240)
        assert process.returncode != 0
        (line,) = [line for line in errors.splitlines() if line.startswith("fusebert: ")]
        assert expected in line


def test_the_size_of_a_step_is_of_all_processes() -> None:
    settings = PretrainSettings(data=Path("x"), out=Path("y"), steps=1, device="cpu")
    plan = resolve(settings, Ranks(1, 4, 1, 4))
    assert (plan.tokens_per_batch, plan.step_sizes, plan.batch_tokens) == (2048, (Phase(4, 1.0),), 4 * 2048)
    plan = resolve(dataclasses.replace(settings, batch_tokens=4096), Ranks(1, 4, 1, 4))
    assert (plan.tokens_per_batch, plan.step_sizes, plan.batch_tokens) == (1024, (Phase(4, 1.0),), 4096)
    plan = resolve(dataclasses.replace(settings, tokens_per_batch=256, batch_tokens=4096), Ranks(0, 2, 0, 2))
    assert (plan.tokens_per_batch, plan.step_sizes, plan.batch_tokens) == (256, (Phase(16, 1.0),), 4096)
    with pytest.raises(UserError, match=r"multiple of --tokens-per-batch 256 times 3 processes: 3840 is the nearest"):
        resolve(dataclasses.replace(settings, tokens_per_batch=256, batch_tokens=4096), Ranks(0, 3, 0, 3))
    with pytest.raises(UserError, match="choose one of ddp, fsdp"):
        resolve(dataclasses.replace(settings, parallel="pipeline"))
    state = TrainerState(identity={"--tokens-per-batch": 256, "--batch-tokens": 1024})
    same = keep_batch_sizes(settings, state, Ranks(0, 4, 0, 4))
    assert (same.tokens_per_batch, same.batch_tokens) == (256, 1024)
    with pytest.raises(UserError, match=r"has 4 micro-batches .* divides 4; there are 3"):
        keep_batch_sizes(settings, state, Ranks(0, 3, 0, 3))
