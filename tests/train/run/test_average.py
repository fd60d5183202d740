"""`pretrain --ema`: the average is evaluated and exported, and a continued run has the same bits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, records
from safetensors.torch import load_file
from small_corpus import make_corpus

from fusebert.model import from_hf
from fusebert.train.errors import UserError
from fusebert.train.run.export import ExportSettings, export
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("average"))


def run(corpus: Path, out: Path, **settings: Any) -> Any:
    return pretrain(PretrainSettings(**{**SMALL, "data": corpus, "out": out, "lr": 0.01, **settings}), "fusebert ...")


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    place = out / "checkpoints" / f"step-{step:08d}"
    return {**load_file(place / "model.safetensors"), **load_file(place / "optimizer.safetensors")}


def test_a_run(corpus: Path, tmp_path: Path) -> None:
    given = {"steps": 6, "save_every": 3, "eval_every": 3, "ema": 0.9}
    run(corpus, tmp_path / "run", **given)
    run(corpus, tmp_path / "plain", **{**given, "ema": None})
    found, plain = tensors(tmp_path / "run", 6), tensors(tmp_path / "plain", 6)
    assert all(torch.equal(found[name], value) for name, value in plain.items())  # training is the same
    exported = dict(from_hf(tmp_path / "run" / "hf").named_parameters())
    for name, value in exported.items():
        assert torch.equal(value, found[f"{name}/average"]), name
    assert not torch.equal(exported["mlm_dense.weight"], found["mlm_dense.weight"])
    losses = [[record["mlm_loss"] for record in records(tmp_path / name, "eval")] for name in ("run", "plain")]
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]

    export(ExportSettings(checkpoint=tmp_path / "run", out=tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "hf" / "model.safetensors"
    ).read_bytes()

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    run(corpus, tmp_path / "cut", resume=True, **given)
    again = tensors(tmp_path / "cut", 6)
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], found[name]) for name in found)

    with pytest.raises(UserError, match=r"another --ema \(0.9 there, None here\)"):
        run(corpus, tmp_path / "run", resume=True, **{**given, "ema": None})


def test_the_best_checkpoint_is_exported_with_its_average(corpus: Path, tmp_path: Path) -> None:
    """The rate makes the loss rise, so that the first evaluation after a step is the best one."""
    settings = {"steps": 4, "eval_every": 1, "ema": 0.5, "keep_best": True, "schedule": "constant", "warmup": 0.0}
    report = run(corpus, tmp_path / "run", **{**settings, "lr": 3.0})
    assert report.model_step < 4
    found = tensors(tmp_path / "run", report.model_step)
    for name, value in from_hf(tmp_path / "run" / "hf").named_parameters():
        assert torch.equal(value, found[f"{name}/average"]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 1.0}, "--ema must be between 0 and 1; got 1.0"),
        ({"ema": 0.9, "parallel": "fsdp"}, "--ema is not possible with --parallel fsdp"),
        ({"sop": True, "nsp": False}, "--sop predicts the order of sentence pairs"),
    ],
)
def test_what_cannot_be(corpus: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "out", steps=1, **settings)
