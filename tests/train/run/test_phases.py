"""`pretrain --seqlen 24:0.5,40`: segments that become longer during a run."""

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
from fusebert.train.run import checkpoint, loop
from fusebert.train.run.phases import Phase, in_words, longest, parse_seqlen, phases
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.step.step import TrainingStep

TWO = "24:0.5,40"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("phases"))


def run(corpus: Path, out: Path, **settings: Any) -> Any:
    settings = {**SMALL, "data": corpus, "out": out, "seqlen": TWO, "batch_tokens": 512, **settings}
    return pretrain(PretrainSettings(**settings), resume_command="RESUME")


def test_the_option() -> None:
    assert parse_seqlen("128") == 128
    assert parse_seqlen(" 128:0.9, 512 ") == "128:0.9,512"
    assert phases(128) == (Phase(128, 1.0),)
    assert phases("64:0.25,128:0.5,512") == (Phase(64, 0.25), Phase(128, 0.75), Phase(512, 1.0))
    assert longest("64:0.25,512:0.5,128") == 512
    assert in_words(phases("64:0.25,128:0.5,512")) == "64 for 25 % of the run, then 128 for 50 % of the run, then 512"
    assert in_words(phases(128)) == "128"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("long", "must be a number of tokens"),
        ("128,512", "must be a number of tokens"),
        ("128:0.9", "must be a number of tokens"),
        ("128:x,512", "must be a number of tokens"),
        ("128:0,512", "the shares must be positive"),
        ("128:1,512", "their sum below 1"),
        ("64:0.6,128:0.4,512", "their sum below 1"),
        ("128:nan,512", "the shares must be positive"),
        ("128:0.9,4", "at least 8"),
        ("128:0.9,10000000", "at most 1048576"),
    ],
)
def test_what_it_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_seqlen(text)


def test_each_phase_has_its_segments_and_the_export_says_how_long(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = TrainingStep.__call__

    def look(self: TrainingStep, window: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({(batch.max_seqlen, int(batch.cu_seqlens.diff().max())) for batch in window})
        return original(self, window, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", look)
    report = run(corpus, tmp_path / "run", steps=6, eval_every=2)
    bounds = [max(bound for bound, _ in each) for each in seen]
    assert len(set(bounds[:3])) == len(set(bounds[3:])) == 1
    assert bounds[0] < bounds[3]
    assert max(longest for each in seen[:3] for _, longest in each) <= 24 < max(n for each in seen[3:] for _, n in each)
    assert [record["seqlen"] for record in records(tmp_path / "run", "eval")] == [24, 24, 40, 40]
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert (state.batches, state.phases) == (12, [6])
    assert report.seqlen == "24 for 50 % of the run, then 40"
    assert report.seqlen in (tmp_path / "run" / "report.md").read_text()
    settings = json.loads((tmp_path / "run" / "hf" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 40
    # Text is read in another order, not once more from the start.
    first = run(corpus, tmp_path / "one", steps=1, seqlen=24)
    assert json.loads((tmp_path / "one" / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 24
    assert first.seqlen == "24"


@pytest.mark.parametrize("cut", [2, 3, 4, 5])  # the second phase begins after step 3
def test_continuing_is_bit_identical(corpus: Path, tmp_path: Path, cut: int, monkeypatch) -> None:
    starts: list[int] = []
    original = loop.batches
    monkeypatch.setattr(loop, "batches", lambda *a, **k: [starts.append(k["start"]), original(*a, **k)][1])
    settings = {"steps": 6, "save_every": 1, "keep": 9}
    run(corpus, tmp_path / "complete", **settings)
    shutil.copytree(tmp_path / "complete", tmp_path / "cut")
    for step in range(cut + 1, 7):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    run(corpus, tmp_path / "cut", resume=True, **settings)
    # Each phase has its own text, from the start; two micro-batches a step.
    assert starts == [0, 0, *([4, 0] if cut == 2 else [2 * (cut - 3)])]
    for name in ("model", "optimizer"):
        one, two = (weights(tmp_path / place, 6, name) for place in ("complete", "cut"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_in_phases_is_repeated(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path / "run", steps=4)
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["fusebert", "pretrain", "--reproduce", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    torch.set_num_threads(threads)
    assert "the weights are those of" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run-reproduced" / "run.json").read_text())
    assert manifest["settings"]["seqlen"] == TWO


def test_a_step_on_static_buffers_takes_the_new_shape(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU: the static batch has one shape."""
    original = TrainingStep.__init__
    run(corpus, tmp_path / "plain", steps=4)
    monkeypatch.setattr(
        TrainingStep, "__init__", lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "graph": True})
    )
    run(corpus, tmp_path / "static", steps=4)
    one, two = (weights(tmp_path / place, 4) for place in ("plain", "static"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_by_the_clock(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", minutes=0.15)
    lengths = [record["seqlen"] for record in records(tmp_path / "run", "eval")]
    assert lengths == sorted(lengths)
    assert set(lengths) == {24, 40}
    state = checkpoint.read_state(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert len(state.phases) == 1


def test_what_does_not_go_with_it(corpus: Path, tmp_path: Path) -> None:
    for changed in ({"keep_best": True}, {"patience": 2}):
        with pytest.raises(UserError, match=r"evaluations, and those of --seqlen 24:0.5,40"):
            run(corpus, tmp_path / "out", steps=2, **changed)
    with pytest.raises(UserError, match="--seqlen 600 is more than the model's 512 positions"):
        run(corpus, tmp_path / "out", steps=2, seqlen="24:0.5,600", tokens_per_batch=1024, batch_tokens=1024)
    run(corpus, tmp_path / "run", steps=2)
    with pytest.raises(UserError, match=r"another --seqlen \(24:0.5,40 there, 24 here\)"):
        run(corpus, tmp_path / "run", steps=4, seqlen=24, resume=True)
