"""fusebert bench finetune-parity: dev accuracies of fine-tuning, ours and Transformers', with several seeds."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from oracle import DEVICE
from typer.testing import CliRunner
from untrained import untrained_model

from fusebert.bench.cli import app
from fusebert.bench.measure.statistics import paired_difference
from fusebert.bench.steps import finetune_parity as bench

pytest.importorskip("transformers", minversion="5")


def invoke(*args):
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The command on a model of random weights, which learns animals from 40 texts."""
    place = tmp_path_factory.mktemp("parity")
    untrained_model(place)
    rng = random.Random(0)
    for name in ("train", "dev"):
        rows = [(f"The {x} lives in the {rng.choice(['tower', 'forest'])}.", x) for x in ["fox", "owl"] * 20]
        (place / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{x}\n" for text, x in rows))
    words = ["finetune-parity", "--model", place / "model", "--train", place / "train.tsv", "--dev", place / "dev.tsv"]
    return [*words, "--device", DEVICE, "--dtype", "fp32", "--batch", 8, "--epochs", 8, "--lr", 2e-3, "--seeds", 2]


def test_both_learn_the_same(quick, tmp_path):
    out = tmp_path / "parity.json"
    done = invoke(*quick, "--out", out)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["kind"], result["train_texts"], result["dev_texts"], result["classes"]) == (
        "finetune_parity",
        40,
        40,
        2,
    )
    for scores in result["accuracy"].values():
        assert len(scores) == 2
        assert min(scores) > 0.9
    assert result["settings"]["train"] == "train.tsv"
    assert invoke("report", out, "--out", tmp_path / "page").exit_code == 0
    assert "within the noise of a seed" in (tmp_path / "page" / "report.md").read_text()


def test_a_loop_that_does_not_learn_is_noticed(quick, monkeypatch):
    monkeypatch.setattr(bench, "set_learning_rate", lambda optimizer, lr: None)
    monkeypatch.setattr(bench, "make_optimizer", lambda model, lr, decay: bench.torch.optim.SGD(model.parameters(), 0))
    done = invoke(*quick)
    assert done.exit_code == 1, done.output
    assert "OUTSIDE the noise of a seed" in done.output


def test_texts_of_the_installed_packages(tmp_path, monkeypatch):
    root = tmp_path / "site"
    for i in range(6):
        for j in range(12):
            path = root / f"p{i}" / f"{j}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            long = f"{i} {j} " + "words that are enough for a sentence of this length " * 3
            path.write_text(f'"""{long}. The end."""\n')
    monkeypatch.setattr(bench.sysconfig, "get_path", lambda name: str(root))
    train, dev = bench.write_texts(tmp_path, 10)
    rows = [[json.loads(line) for line in Path(name).read_text().splitlines()] for name in (train, dev)]
    assert list(map(len, rows)) == [10, 20]
    assert len({row["label"] for row in rows[0]}) == bench.PACKAGES
    assert not {row["text"] for row in rows[0]} & {row["text"] for row in rows[1]}
    with pytest.raises(bench.UserError, match="too few docstrings for --count 1000"):
        bench.write_texts(tmp_path, 1000)


def test_the_interval_of_a_difference():
    found = paired_difference([0.8, 0.9, 0.85], [0.79, 0.9, 0.87])  # t(0.975, 2) = 4.3027
    expected = 4.302653 * np.std([0.01, 0.0, -0.02], ddof=1) / np.sqrt(3)
    assert (found.high - found.mean, found.mean) == pytest.approx((expected, -0.01 / 3))
    assert paired_difference([1.0, 1.0], [0.5, 0.5]).low == 0.5
    with pytest.raises(ValueError, match="at least two pairs"):
        paired_difference([1.0], [1.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--seeds", 1], "--seeds must be at least 2"), (["--dev", "none.tsv"], "none.tsv does not exist")],
)
def test_mistakes(quick, words, message):
    assert message in str(invoke(*quick, *words).exception)
