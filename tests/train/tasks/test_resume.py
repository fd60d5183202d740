"""``finetune --out RUN --resume`` is enough for every task: it has the run's options, and takes --test afterwards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

# Options with other values than their defaults, off switches and lists among them.
RUNS = {
    "classify": ["--train", "dev.tsv", "--dev", "dev.tsv", "--class-weights", "balanced", "--seqlen", "12"],
    "regress": [
        "--train",
        "dev.jsonl",
        "--dev",
        "dev.jsonl",
        "--text",
        "one",
        "--text-pair",
        "two",
        "--label",
        "score",
    ],
    "tag": ["--train", "dev.conll", "--dev", "dev.conll", "--seqlen", "6", "--stride", "2", "--layer-decay", "0.5"],
    "qa": ["--train", "dev.json", "--dev", "dev.json", "--seqlen", "24", "--stride", "4", "--max-answer-tokens", "5"],
    "embed": [
        *("--train", "pairs-dev.tsv", "--dev", "pairs-dev.tsv", "--negative", "negative"),
        *("--pooling", "cls", "--no-normalize", "--temperature", "0.1"),
    ],
}
OF_A_SESSION = {"out", "resume", "test"}


def settings_in(out: Path) -> dict[str, object]:
    settings = json.loads((out / "run.json").read_text())["settings"]
    return {name: value for name, value in settings.items() if name not in OF_A_SESSION}


@pytest.mark.parametrize("task", RUNS)
def test_a_run_recalls_its_options(task: str, place: Path, fusebert: Callable[..., int], tmp_path: Path) -> None:
    out, words = tmp_path / "run", RUNS[task]
    common = ["--epochs", "1", "--batch-size", "40", "--lr", "1e-3", "--no-tensorboard", "--no-graph", "--seed", "3"]
    assert fusebert("finetune", "--model", "model", "--task", task, *words, *common, "--out", out) == 0
    before = settings_in(out)
    given = dict(zip(words[::2], words[1::2], strict=False)) if task != "embed" else {}
    for option, value in given.items():
        if option != "--train":
            assert str(before[option[2:].replace("-", "_")]) == value
    assert fusebert("finetune", "--out", out, "--resume", "--test", words[3]) == 0
    assert settings_in(out) == before
    report = json.loads((out / "report.json").read_text())
    # The test texts are the dev texts, and the best model is the only one.
    assert report["test"]["seeds"][0] == pytest.approx(report["seeds"][0]["scores"], abs=1e-6, nan_ok=True)
    assert fusebert("finetune", "--out", out, "--resume", "--lr", "1e-4") == 2
