"""`pretrain --recipe`: a set of defaults that an option on the command line, or the run itself, overrides."""

import dataclasses
import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from fusebert.train.options import command
from fusebert.train.run.settings import RECIPES, PretrainSettings

DEFAULTS = {field.name: field.default for field in dataclasses.fields(PretrainSettings)}


def parsed(*words: object) -> PretrainSettings:
    seen: list[PretrainSettings] = []
    app = typer.Typer()
    app.command()(command(PretrainSettings, seen.append))
    done = CliRunner().invoke(app, ["--data", "data", "--steps", "3", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen[0]


def chosen(settings: PretrainSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in RECIPES["fast"]}


def test_the_paper_is_the_default(tmp_path: Path) -> None:
    assert chosen(parsed("--out", tmp_path)) == {name: DEFAULTS[name] for name in RECIPES["fast"]}
    assert chosen(parsed("--out", tmp_path, "--recipe", "bert")) == {name: DEFAULTS[name] for name in RECIPES["fast"]}


def test_an_option_that_is_given_wins(tmp_path: Path) -> None:
    assert chosen(parsed("--recipe", "fast", "--out", tmp_path)) == RECIPES["fast"]
    assert chosen(parsed("--out", tmp_path, "--recipe", "fast", "--resume")) == RECIPES["fast"]  # nothing to continue
    for words in (("--dropout", 0.2, "--recipe", "fast"), ("--recipe", "fast", "--dropout", 0.2)):
        assert chosen(parsed(*words, "--out", tmp_path)) == {**RECIPES["fast"], "dropout": 0.2}


def test_a_continued_run_keeps_what_it_had(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    settings = {**DEFAULTS, **RECIPES["fast"], "data": "data", "out": str(tmp_path), "recipe": "fast", "dropout": 0.2}
    settings = {name: value for name, value in settings.items() if value is not dataclasses.MISSING}
    session = {"step": 0, "settings": settings}
    content = {"version": 1, "ranks": 1, "identity": {}, "settings": settings, "sessions": [session]}
    (tmp_path / "run.json").write_text(json.dumps(content))
    for words in ((), ("--recipe", "fast")):
        found = parsed("--out", tmp_path, "--resume", *words)
        assert chosen(found) == {**RECIPES["fast"], "dropout": 0.2}
        assert found.recipe == "fast"
