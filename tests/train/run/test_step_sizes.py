"""`pretrain --batch-tokens 256:0.5,512`: optimisation steps that become larger during a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, records, weights
from small_corpus import make_corpus

from fusebert.train import cli
from fusebert.train.errors import UserError
from fusebert.train.run import checkpoint
from fusebert.train.run.phases import Phase, common_divisor, parse_batch_tokens, step_sizes
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.optim import learning_rate
from fusebert.train.step.step import TrainingStep

GROWING = "256:0.5,768"  # one micro-batch a step, then three


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("step_sizes"))


def run(corpus: Path, out: Path, **settings: Any) -> Any:
    settings = {**SMALL, "data": corpus, "out": out, "batch_tokens": GROWING, **settings}
    return pretrain(PretrainSettings(**settings), resume_command="RESUME")


def test_the_option() -> None:
    assert parse_batch_tokens("2048") == 2048
    assert parse_batch_tokens(" 512:0.25, 2048 ") == "512:0.25,2048"
    assert step_sizes("512:0.25,1024:0.5,2048") == (Phase(512, 0.25), Phase(1024, 0.75), Phase(2048, 1.0))
    assert common_divisor("768:0.5,1024") == 256


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("many", "--batch-tokens must be a number of tokens, or numbers with the share"),
        ("512,1024", "as in 32768:0.2,131072"),
        ("512:1.0,1024", "the shares must be positive, and their sum below 1"),
        ("0:0.5,1024", "--batch-tokens must be positive; got 0"),
        (-8, "--batch-tokens must be positive; got -8"),
        ("256:0.5,1000", "--batch-tokens 1000 must be a multiple of --tokens-per-batch 256: 1024 is the nearest"),
    ],
)
def test_what_it_cannot_be(corpus: Path, tmp_path: Path, value: int | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "run", steps=2, batch_tokens=value)


def test_a_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes on where it is; the rate is that of its schedule; the first steps are those of a constant size."""
    seen: list[list[torch.Tensor]] = []
    original = TrainingStep.__call__

    def look(self: TrainingStep, window: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([batch.input_ids.clone() for batch in window])
        return original(self, window, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", look)
    run(corpus, tmp_path / "run", steps=4, save_every=2)
    growing, seen[:] = list(seen), []
    run(corpus, tmp_path / "constant", steps=4, batch_tokens=256, save_every=2)
    run(corpus, tmp_path / "longer", steps=8, batch_tokens=256)
    assert [len(window) for window in growing] == [1, 1, 3, 3]
    read, expected = [x for window in growing for x in window], [x for window in seen[4:] for x in window]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(read, expected, strict=True))
    one, two = (weights(tmp_path / name, 2) for name in ("run", "constant"))
    assert all(torch.equal(one[key], two[key]) for key in one)

    lines = records(tmp_path / "run", "train")
    settings = PretrainSettings(**{**SMALL, "data": corpus, "out": tmp_path})
    rates = [
        learning_rate(lines[-1]["lr"] / learning_rate(1.0, 3.5 / 4, settings.warmup), (n + 0.5) / 4, settings.warmup)
        for n in range(4)
    ]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert (state.batches, state.step_sizes) == (8, [2])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["batch_tokens"] == GROWING


@pytest.mark.parametrize("cut", [1, 2, 3])  # the larger steps begin after step 2
def test_continuing_is_bit_identical(corpus: Path, tmp_path: Path, cut: int) -> None:
    settings = {"steps": 4, "save_every": 1, "keep": 9}
    run(corpus, tmp_path / "complete", **settings)
    shutil.copytree(tmp_path / "complete", tmp_path / "cut")
    for step in range(cut + 1, 5):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    run(corpus, tmp_path / "cut", resume=True, **settings)
    for name in ("model", "optimizer"):
        one, two = (weights(tmp_path / place, 4, name) for place in ("complete", "cut"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UserError, match="another --batch-tokens"):
        run(corpus, tmp_path / "cut", resume=True, **{**settings, "steps": 6, "batch_tokens": "256:0.25,768"})


def test_a_step_on_static_buffers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the buffers have the shape of a micro-batch, so they stay when there are more of them."""
    original = TrainingStep.__init__
    run(corpus, tmp_path / "plain", steps=4)
    monkeypatch.setattr(
        TrainingStep, "__init__", lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "graph": True})
    )
    monkeypatch.setattr(TrainingStep, "forget_shapes", lambda self: pytest.fail("nothing is to be captured anew"))
    run(corpus, tmp_path / "static", steps=4)
    one, two = (weights(tmp_path / place, 4) for place in ("plain", "static"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_with_longer_segments(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", steps=8, seqlen="24:0.5,40", batch_tokens="256:0.25,768")
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert (state.batches, state.step_sizes, state.phases) == (2 * 1 + 6 * 3, [2], [2 * 1 + 2 * 3])


def test_by_the_clock(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", minutes=0.15)
    state = checkpoint.read_state(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    (grown,) = state.step_sizes
    assert 0 < grown < state.step
    assert state.batches == grown + 3 * (state.step - grown)


@pytest.mark.parametrize("wrong", [{"batches": 9}, {"step_sizes": []}, {"step_sizes": [2, 3]}, {"step_sizes": [1]}])
def test_counts_that_do_not_fit_together(corpus: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    run(corpus, tmp_path / "run", steps=4)
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "trainer.json"
    content = json.loads(path.read_text())
    assert (content["state"]["batches"], content["state"]["step_sizes"]) == (8, [2])
    del content["crc32"]
    content["version"] = 2  # without a checksum
    content["state"].update(wrong)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="are damaged"):
        run(corpus, tmp_path / "run", steps=4, resume=True)


def test_from_the_command_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    words = ["--tokens-per-batch", "256", "--batch-tokens", GROWING, "--seqlen", "40", "--steps", "2"]
    place = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--no-tensorboard", "--processes", "1"]
    for given in (words + place, ["--reproduce", str(tmp_path / "run")]):
        monkeypatch.setattr("sys.argv", ["fusebert", "pretrain", *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "2 steps" in printed
    assert "of 1 for 50 % of the run, then 3 × 256 tokens" in printed
    assert "from here on steps of 3 micro-batches" in printed
    assert "the weights are those of" in printed
