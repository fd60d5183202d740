"""fusebert bench train: a real, short run beside Transformers."""

import json

import pytest
from oracle import DEVICE
from small_corpus import make_corpus
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.steps import train as train_run
from fusebert.train.corpus.format import CorpusError

OPTIONS = ["--model", "tiny", "--tokens", "256", "--seqlen", "32", "--minutes", "0.03", "--device", DEVICE]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def invoke(*args):
    return CliRunner().invoke(app, ["train", *map(str, args)])


def test_same_examples_two_trainers(corpus, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "train.json"
    done = invoke("--data", corpus, "--dropout", 0.0, "--dtype", "fp32", "--out", out, *OPTIONS)
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.output
    result = json.loads(out.read_text())
    assert result["kind"] == "train"
    assert str(corpus) not in out.read_text()  # a result file is published; a user's folders are not
    ours, theirs = result["contestants"]
    assert (ours["name"], theirs["name"]) == ("fusebert", "transformers")
    assert ours["verdict"]["status"] == "right"
    # Without dropout the same function of the same examples at the same rates: the same losses, step by step.
    common = min(ours["steps"], theirs["steps"])
    assert common > train_run.UNTIMED_STEPS
    for a, b in zip(ours["losses"][:common], theirs["losses"][:common], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    for row in (ours, theirs):
        assert len(row["us_per_token"]) == len(row["curve"]) == train_run.TURNS
        assert row["steps"] == len(row["losses"]) == row["curve"][-1]["step"]
        assert row["tokens"] == row["curve"][-1]["tokens"] <= 256 * row["steps"]
        assert row["tokens"] > 0.9 * 256 * row["steps"]  # real tokens: the slack is small
        assert [point["seconds"] for point in row["curve"]] == sorted(point["seconds"] for point in row["curve"])
        low, high = min(row["us_per_token"]), max(row["us_per_token"])
        assert 1e6 / high <= row["tokens_per_s"] <= 1e6 / low
        assert row["losses"][-1] < row["losses"][0]
    assert ours["ratio_to_ours"]["median"] == 1.0


def test_ours_that_computes_something_else_does_not_train(corpus, monkeypatch):
    pytest.importorskip("transformers")
    evaluate = train_run.evaluate

    def off(*args):
        found = evaluate(*args)
        return type(found)(**{**found.__dict__, "mlm_loss": 1.01 * found.mlm_loss})

    monkeypatch.setattr(train_run, "evaluate", off)
    done = invoke("--data", corpus, *OPTIONS)
    assert done.exit_code == 1
    assert "fusebert is wrong (held-out loss" in done.output
    assert "transformers" in done.output


def test_no_corpus(tmp_path):
    done = invoke("--data", tmp_path, *OPTIONS)
    assert isinstance(done.exception, CorpusError)
    assert "\n" not in str(done.exception)
