"""fusebert bench quality: training recipes, by the tokens until a held-out loss."""

import json
import re
import types

import pytest
from oracle import DEVICE
from small_corpus import make_corpus
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.result import QualityPoint, QualityRecipe, QualityResult, QualityRun, read_result
from fusebert.bench.steps import quality_task
from fusebert.bench.steps.quality import parse
from fusebert.train.errors import UserError


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    place = tmp_path_factory.mktemp("quality")
    recipes = "bert, seqlen=32; fast, seqlen=32, steps=3, processes=1, tokens-per-batch=512, batch-tokens=512:0.5,1024"
    words = ["quality", "--data", make_corpus(place), "--steps", 4, "--seeds", 1, "--recipes", recipes, "--no-finetune"]
    return CliRunner().invoke(app, [*map(str, words), "--out", str(place / "q.json"), "--device", DEVICE]), place


def test_runs_and_their_costs(measured):
    done, place = measured
    assert done.exit_code == 0, done.output
    result = read_result(place / "q.json", QualityResult)
    bert, fast = result.recipes
    assert (bert.name, fast.name.partition(", proc")[0]) == ("bert, seqlen=32", "fast, seqlen=32, steps=3")
    tokens = [point.tokens for point in fast.runs[0].points]
    assert tokens == pytest.approx([0, 512, 1024, 2048], rel=0.02)  # a few slots of a batch stay empty
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
    assert "| fast, seqlen=32, steps=3, processes=1" in text
    assert (place / "report" / "q-recipes.png").is_file()


@pytest.mark.slow
def test_the_accuracy_after_fine_tuning(tmp_path):
    """The task's texts are in no corpus, no file has texts in two tables, and the accuracy reaches every report."""
    words = ["quality", "--data", make_corpus(tmp_path), "--steps", 2, "--seeds", 1, "--recipes", "bert; fast"]
    done = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "q.json"), "--device", DEVICE])
    assert done.exit_code == 0, done.output
    result = read_result(tmp_path / "q.json", QualityResult)
    for recipe in result.recipes:
        assert 0.05 < recipe.runs[0].finetuned_accuracy < 0.95
    assert CliRunner().invoke(app, ["report", str(tmp_path / "q.json"), "--out", str(tmp_path / "r")]).exit_code == 0
    assert "fine-tuned accuracy" in (tmp_path / "r" / "report.md").read_text()
    assert (tmp_path / "r" / "q-recipes-finetuned.png").is_file()


def test_the_tables_of_the_task(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_task, "PACKAGES", ("json", "email"))
    for package, names in (("json", 6), ("email", 6)):
        (tmp_path / "lib" / package).mkdir(parents=True)
        for number in range(names):
            fruits = ("apple", "pear", package) if package == "json" else ("plum", "melon", package)
            texts = [f"About the {word} number {number} of a package." for word in fruits]
            texts.append("Long " * 30)
            body = "\n".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts))
            (tmp_path / "lib" / package / f"m{number}.py").write_text(body if number else "def broken(")
    found = {
        package: types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "lib" / package)])
        for package in ("json", "email")
    }
    monkeypatch.setattr(quality_task.importlib.util, "find_spec", found.get)
    quality_task.write_tables(tmp_path)
    tables = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "dev", "test")
    }
    files = {name: {(row["label"], re.search(r"\d", row["text"])[0]) for row in rows} for name, rows in tables.items()}
    assert not files["train"] & files["test"]
    assert not files["dev"] & files["test"]
    assert not files["train"] & files["dev"]
    texts = [row["text"] for rows in tables.values() for row in rows]
    assert len(texts) == len(set(texts)) > 0
    assert all(len(x["text"]) <= 80 and x["label"] not in x["text"] for rows in tables.values() for x in rows)
    monkeypatch.setattr(quality_task, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(UserError, match=r"no_such_package is not installed.*--no-finetune"):
        quality_task.write_tables(tmp_path)


def test_a_file_is_continued_with_seeds_and_recipes(measured):
    """The runs in it stay, those that it lacks are added, and runs that do not compare are refused."""
    place = measured[1]
    (place / "more.json").write_bytes((place / "q.json").read_bytes())
    before = read_result(place / "more.json", QualityResult)

    def again(recipes, *words):
        given = ["quality", "--data", place / "corpus", "--steps", 4, "--recipes", recipes, "--no-finetune", "--resume"]
        return CliRunner().invoke(app, [*map(str, [*given, *words]), "--device", DEVICE])

    done = again("bert, seqlen=32; bert, seqlen=32, lr=1e-4", "--seeds", 2, "--out", place / "more.json")
    assert done.exit_code == 0, done.output
    assert "bert, seqlen=32, seed 0" not in done.output
    after = read_result(place / "more.json", QualityResult)
    assert [(recipe.name, [run.seed for run in recipe.runs]) for recipe in after.recipes] == [
        (before.recipes[0].name, [0, 1]),
        (before.recipes[1].name, [0]),
        ("bert, seqlen=32, lr=1e-4", [0, 1]),
    ]
    assert [recipe.options for recipe in after.recipes[:2]] == [recipe.options for recipe in before.recipes]
    assert after.recipes[0].runs[0] == before.recipes[0].runs[0]
    assert after.recipes[1] == before.recipes[1]
    assert after.settings.seeds == 2
    assert list(parse(after.settings.recipes)) == [recipe.name for recipe in after.recipes]
    assert after.recipes[0].runs[1].last.mlm_loss != after.recipes[0].runs[0].last.mlm_loss

    done = again("bert, seqlen=32", "--out", place / "more.json", "--steps", 5)
    assert re.search(r"have another --steps \(4 there, 5 here\): give another --out", str(done.exception))
    assert "give --out" in str(again("bert, seqlen=32").exception)
    assert read_result(place / "more.json", QualityResult) == after


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


def test_at_equal_time():
    first, other = (QualityRecipe(name, "", (each,)) for name, each in (("a", run(8, 7, 6)), ("b", run(8, 5, 4, 3))))
    result = object.__new__(QualityResult)
    result.recipes = [first, other]
    assert result.at_equal_time(other, lambda point: point.mlm_loss) == [4 - 6]  # not the 3 that comes later
    shorter = QualityRecipe("c", "", (run(8, 5),))
    assert result.at_equal_time(shorter, lambda point: point.mlm_loss) == [5 - 7]
    assert result.at_equal_time(shorter, lambda point: point.nsp_accuracy) == []


def test_recipes_in_words():
    assert parse("bert; bert, cautious-decay; fast, lr=1e-3 ,weight_decay=0") == {
        "bert": ["--recipe=bert"],
        "bert, cautious-decay": ["--recipe=bert", "--cautious-decay"],
        "fast, lr=1e-3, weight_decay=0": ["--recipe=fast", "--lr=1e-3", "--weight-decay=0"],
    }
    assert parse("fast, seqlen=64:0.5,128, batch-tokens=512:0.25, 1024,lr=1e-3") == {
        "fast, seqlen=64:0.5,128, batch-tokens=512:0.25, 1024, lr=1e-3": [
            "--recipe=fast",
            "--seqlen=64:0.5,128",
            "--batch-tokens=512:0.25, 1024",
            "--lr=1e-3",
        ]
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
    done = CliRunner().invoke(app, [*words, "--no-finetune", "--device", DEVICE])
    assert done.exit_code != 0
    assert "--lr must be positive" in str(done.exception)
    assert json.loads((measured[1] / "q.json").read_text())["kind"] == "quality"
