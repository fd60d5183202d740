"""Places that a run cannot write to: found at the start, or at the first write, with nothing half replaced."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import Ended, run_jobs
from runs import SMALL, command_line, weights
from small_corpus import make_corpus, write_text

from fusebert.model import from_hf
from fusebert.train.errors import UserError
from fusebert.train.run import checkpoint
from fusebert.train.run.log import read_log
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.step import TrainingStep


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus: Path, out: Path, **settings: Any) -> Any:
    return pretrain(PretrainSettings(**{**SMALL, "data": corpus, "out": out, **settings}), "RESUME")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", "file"),
        ("hf", "file"),
        ("checkpoints", "file"),
        ("checkpoints", "broken link"),
        ("inputs", "broken link"),
        ("log.jsonl", "folder"),
        ("run.json", "folder"),
        ("report.json", "folder"),
        (".lock", "folder"),
        (".lock", "link"),
    ],
)
def test_something_else_in_its_place(corpus: Path, tmp_path: Path, name: str, kind: str) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    other.write_text("mine")
    path = out / name if name else out
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"--out") as caught:
        run(corpus, out, steps=1)
    assert caught.value.filename == str(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert other.read_text() == "mine"


def test_links_to_folders(corpus: Path, tmp_path: Path) -> None:
    """The model and the checkpoints may be on another disk; the links stay."""
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "disk").mkdir()
    for name in ("hf", "checkpoints"):
        (tmp_path / "disk" / name).mkdir()
        (out / name).symlink_to(tmp_path / "disk" / name)
    run(corpus, out, steps=1)
    assert (out / "hf").is_symlink()
    assert (out / "checkpoints").is_symlink()
    assert torch.equal(from_hf(tmp_path / "disk" / "hf").state_dict()["mlm_bias"], weights(out, 1)["mlm_bias"])


def test_a_folder_in_the_place_of_an_exported_file(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(corpus, out, steps=1)
    before = (out / "hf" / "config.json").read_bytes(), (out / "hf" / "model.safetensors").read_bytes()
    (out / "hf" / "vocab.txt").unlink()
    (out / "hf" / "vocab.txt").mkdir()
    with pytest.raises(OSError, match=r"vocab\.txt") as caught:
        run(corpus, out, steps=2, resume=True)
    assert "step-00000002; solve the problem, then go on with: RESUME" in str(caught.value)
    assert ((out / "hf" / "config.json").read_bytes(), (out / "hf" / "model.safetensors").read_bytes()) == before
    (out / "hf" / "vocab.txt").rmdir()
    run(corpus, out, steps=2, resume=True)
    assert torch.equal(from_hf(out / "hf").state_dict()["mlm_bias"], weights(out, 2)["mlm_bias"])


@pytest.mark.parametrize("what", ["folder", "log", "replaced"])
def test_the_log_deleted_during_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The next log line finds out: the run saves and ends, and can be continued."""
    out, original, calls = tmp_path / "run", TrainingStep.__call__, []

    def step(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            shutil.rmtree(out) if what == "folder" else (out / "log.jsonl").unlink()
            if what == "replaced":
                (out / "log.jsonl").write_text("{}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    with pytest.raises(UserError, match=r"log\.jsonl: deleted or replaced during the run; saved in .*RESUME") as caught:
        run(corpus, out, steps=9)
    assert len(calls) <= 3
    saved = checkpoint.list_checkpoints(out / "checkpoints")[0]
    assert str(saved) in str(caught.value)
    steps = len(calls)
    assert checkpoint.read_state(saved).step == steps
    (out / "log.jsonl").unlink(missing_ok=True)
    assert run(corpus, out, steps=4, resume=True).steps == 4
    assert [r["step"] for r in read_log(out / "log.jsonl") if r["kind"] == "train"] == list(range(steps + 1, 5))


def pretrain_job(corpus: Path, out: Path, at: int) -> dict[str, Any]:
    words = command_line(**SMALL, steps=2, save_every=1, workers=0, data=corpus, out=out)
    return {"words": words, "how": "full" if at else "", "at": at}


def prepare_job(text: Path, out: Path, at: int) -> dict[str, Any]:
    words = ["prepare", str(text), f"--out={out}", "--vocab-size=240", "--workers=1"]
    return {"words": words, "how": "full" if at else "", "at": at}


def nothing_half_replaced(out: Path, ended: Ended) -> None:
    message = ended.output.strip().splitlines()[-1]
    assert ended.status in (1, 2), ended.output
    assert message.startswith(f"fusebert: error: {out}"), ended.output
    assert "File too large" in message
    assert message.endswith(" --resume")
    assert "Traceback" not in ended.output
    for path in checkpoint.list_checkpoints(out / "checkpoints"):
        checkpoint.read_state(path)
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    if (out / "hf").exists():
        from_hf(out / "hf")
    if (out / "log.jsonl").exists():
        assert all("step" in record for record in read_log(out / "log.jsonl"))


def nothing_made(out: Path, ended: Ended) -> None:
    assert ended.status == 1, ended.output
    message = ended.output.strip().splitlines()[-1]
    assert message.startswith(f"fusebert: error: {out}: File too large; nothing is changed there")
    assert "Traceback" not in ended.output
    assert not list(out.parent.glob(f"{out.name}*"))


PRETRAIN, PREPARE = range(1, 41, 5), range(1, 11, 2)  # the file event from which the disk is full


@pytest.fixture(scope="module")
def full(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Ended]:
    """Runs and preparations with a disk that becomes full at a moment, by their folder."""
    place = tmp_path_factory.mktemp("full")
    text = write_text(place / "text.txt")
    jobs = {place / f"run{at}": pretrain_job(corpus, place / f"run{at}", at) for at in PRETRAIN}
    jobs |= {place / f"corpus{at}": prepare_job(text, place / f"corpus{at}", at) for at in PREPARE}
    return dict(zip(jobs, run_jobs(list(jobs.values()), place), strict=True))


@pytest.mark.parametrize("at", PRETRAIN)
def test_a_disk_that_is_full_from_some_write_on(full: dict[Path, Ended], at: int) -> None:
    nothing_half_replaced(*next((out, ended) for out, ended in full.items() if out.name == f"run{at}"))


@pytest.mark.parametrize("at", PREPARE)
def test_a_disk_that_is_full_while_a_corpus_is_made(full: dict[Path, Ended], at: int) -> None:
    nothing_made(*next((out, ended) for out, ended in full.items() if out.name == f"corpus{at}"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pretrain", "prepare"])
def test_a_disk_that_is_full_at_every_write(corpus: Path, tmp_path: Path, what: str) -> None:
    source, job, check = {
        "pretrain": (corpus, pretrain_job, nothing_half_replaced),
        "prepare": (write_text(tmp_path / "text.txt"), prepare_job, nothing_made),
    }[what]
    [whole] = run_jobs([job(source, tmp_path / "whole", 0)], tmp_path)
    assert whole.status == 0, whole.output
    assert whole.events > 10
    outs = {at: tmp_path / f"from{at}-" for at in range(1, whole.events + 1)}
    done = []
    for at, ended in zip(outs, run_jobs([job(source, out, at) for at, out in outs.items()], tmp_path), strict=True):
        if ended.status == 0:
            done.append(at)  # after the last byte: only renames and removals are left
        else:
            check(outs[at], ended)
    print(f"{what}: {whole.events} file events, {len(done)} of them after the last write: {done}")
