"""fusebert bench quality: training recipes, by the tokens until a held-out loss."""

import json

import pytest
from oracle import DEVICE
from small_corpus import make_corpus
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.result import QualityPoint, QualityResult, QualityRun, read_result
from fusebert.bench.steps.quality import parse
from fusebert.train.errors import UserError


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    place = tmp_path_factory.mktemp("quality")
    recipes = "bert, seqlen=32; fast, seqlen=32, steps=3"
    words = ["quality", "--data", make_corpus(place), "--steps", 4, "--seeds", 1, "--recipes", recipes]
    return CliRunner().invoke(app, [*map(str, words), "--out", str(place / "q.json"), "--device", DEVICE]), place


def test_runs_and_their_costs(measured):
    done, place = measured
    assert done.exit_code == 0, done.output
    result = read_result(place / "q.json", QualityResult)
    bert, fast = result.recipes
    assert (bert.name, fast.name) == ("bert, seqlen=32", "fast, seqlen=32, steps=3")
    assert [point.step for point in bert.runs[0].points] == [0, 1, 2, 3, 4]
    assert fast.runs[0].last.step == 3
    assert bert.runs[0].last.tokens == 4 * 2048
    seconds = [point.seconds for point in bert.runs[0].points]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0 < seconds[-1]
    assert result.cost(bert, 0) == (1.0, 1.0, 1.0)
    assert str(place) not in (place / "q.json").read_text()  # a result file is published; a user's folders are not
    assert CliRunner().invoke(app, ["report", str(place / "q.json"), "--out", str(place / "report")]).exit_code == 0
    text = (place / "report" / "report.md").read_text()
    assert "| fast, seqlen=32, steps=3 |" in text
    assert (place / "report" / "q-recipes.png").is_file()


def run(*losses):
    return QualityRun(0, tuple(QualityPoint(i, 100 * i, 10.0 * i, loss, None) for i, loss in enumerate(losses)))


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((8.0, 6.0, 5.0), 5.5, (150.0, 15.0)),
        ((8.0, 6.0, 5.0), 5.0, (200.0, 20.0)),
        ((8.0, 6.0, 6.5, 5.0), 6.0, (100.0, 10.0)),  # the first time
        ((8.0, 6.0, 5.0), 4.9, None),
        ((8.0, 6.0), 9.0, (0.0, 0.0)),
    ],
)
def test_where_a_loss_is_reached(losses, target, expected):
    assert run(*losses).reaches(target) == expected


def test_recipes_in_words():
    assert parse("bert; bert, cautious-decay; fast, lr=1e-3 ,weight_decay=0") == {
        "bert": ["--recipe=bert"],
        "bert, cautious-decay": ["--recipe=bert", "--cautious-decay"],
        "fast, lr=1e-3, weight_decay=0": ["--recipe=fast", "--lr=1e-3", "--weight-decay=0"],
    }
    for wrong, message in (
        ("bert; bert", "is there twice"),
        ("bert, lr 1e-3", "must be option=value"),
        (" ; ", "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            parse(wrong)


def test_a_run_that_fails_is_named(measured):
    words = ["quality", "--data", str(measured[1] / "corpus"), "--seeds", "1", "--recipes", "bert, lr=-1"]
    done = CliRunner().invoke(app, [*words, "--device", DEVICE])
    assert done.exit_code != 0
    assert "--lr must be positive" in str(done.exception)
    assert json.loads((measured[1] / "q.json").read_text())["kind"] == "quality"
