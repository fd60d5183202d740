"""fusebert bench finetune: a fine-tuning step, beside Transformers'."""

import json

import pytest
import torch
from oracle import DEVICE
from typer.testing import CliRunner
from untrained import untrained_model

from fusebert.bench.cli import app
from fusebert.bench.steps import finetune as bench

pytest.importorskip("transformers", minversion="5")
NAMES = ["fusebert", "transformers, dynamic", "transformers, max_length"]


def invoke(*args):
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The command on a model of random weights and nine texts, in steps of two."""
    place = tmp_path_factory.mktemp("finetune")
    untrained_model(place)
    texts = [" ".join(["The fox lives in the forest."] * count) for count in (1, 9, 2, 5, 1, 3, 7, 2, 4)]
    (place / "texts.txt").write_text("\n".join(texts) + "\n")
    words = ["finetune", "--quick", "--model", place / "model", "--texts", place / "texts.txt", "--device", DEVICE]
    return [*words, "--batch", 2, "--seqlen", 64, "--dtype", "fp32"]


def test_the_losses_agree_and_all_are_timed(quick, tmp_path):
    out = tmp_path / "finetune.json"
    done = invoke(*quick, "--out", out)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["kind"], result["settings"]["seqlen"], result["settings"]["count"]) == ("finetune", 64, 8)
    ours, theirs = (result["losses"][name] for name in NAMES[:2])
    assert len(ours) == bench.QUICK_STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(set(ours)) == len(ours)
    assert [each["name"] for each in result["contestants"]] == NAMES
    assert result["contestants"][0]["verdict"]["errors"]["loss"] <= 1e-4
    for each in result["contestants"]:
        assert each["tokens_per_s"] > 0
        assert each["ratio_to_ours"]["low"] <= each["ratio_to_ours"]["median"] <= each["ratio_to_ours"]["high"]
    assert invoke("report", out, "--out", tmp_path / "page").exit_code == 0
    assert (tmp_path / "page" / "report.md").read_text().count("| transformers, ") == 2


def test_a_step_that_learns_something_else_is_not_timed(quick, monkeypatch):
    class Broken(bench.Ours):
        def __init__(self, *args):
            super().__init__(*args)
            self._step.clip = 1e-3

    monkeypatch.setattr(bench, "LEARNING_RATE", 1e-3)
    monkeypatch.setattr(bench, "Ours", Broken)
    done = invoke(*quick)
    assert done.exit_code == 1, done.output
    assert "fusebert is wrong (a loss of the first 3 steps differs by" in done.output


def test_padding_to_max_length_has_the_same_loss(quick):
    folder = bench.open_encoder(quick[3])
    tokenizer = bench.TextTokenizer(folder, 64)
    examples = bench.Examples(tokenizer(["The fox.", "The owl lives in the tower.", "fox"]), torch.tensor([0, 1, 2]))
    losses = []
    for longest in (None, 64):
        theirs = bench.Theirs(folder, examples, 3, torch.device(DEVICE), torch.float32, longest)
        theirs.model.eval()
        losses.append(float(theirs.step(0)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_too_few_texts(quick):
    done = invoke(*quick, "--batch", 10)
    assert "--batch 10 needs as many texts; there are 9" in str(done.exception)
