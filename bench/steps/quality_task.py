"""What a pretrained model is good for: its accuracy on a task, after the same fine-tuning for every recipe.

The task: which package is a docstring from, if it does not name it? The docstrings are too short for a corpus of
``fusebert prepare --corpus pydocs``, so none of them was pretrained on. No source file has docstrings in two tables.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ...model.atomic import replace_file
from ...train.errors import UserError
from ...train.run.plan import LEARNING_RATES
from ...train.text.pydocs import MIN_CHARS, docstrings

PACKAGES = ("torch", "numpy", "scipy", "sklearn", "matplotlib")
SHORTEST = 30  # characters; shorter docstrings say little
FILES = 400  # of a package, at most
COUNTS = {"test": 150, "dev": 50, "train": 100}  # docstrings of each package, at most
SEQLEN, BATCH_SIZE, EPOCHS, LAYER_DECAY = 64, 16, 15, 0.4


def write_tables(place: Path) -> None:
    """train.jsonl, dev.jsonl and test.jsonl of the task in ``place``; the same on every call.

    Raises:
        UserError: a package is not installed.
    """
    tables: dict[str, list[str]] = {name: [] for name in COUNTS}
    for package in PACKAGES:
        found = _short_docstrings(package)
        paths = sorted(set(found.values()))
        random.Random(1).shuffle(paths)
        for start, (name, count) in enumerate(COUNTS.items()):
            chosen = set(paths[start :: len(COUNTS)])
            texts = sorted(text for text, path in found.items() if path in chosen)
            random.Random(2).shuffle(texts)
            tables[name] += [json.dumps({"text": text, "label": package}) + "\n" for text in texts[:count]]
    for name, lines in tables.items():
        with replace_file(place / f"{name}.jsonl") as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def _short_docstrings(package: str) -> dict[str, Path]:
    """The docstrings that a corpus leaves out and that do not name ``package``, each with one file that has it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the fine-tuned accuracy needs docstrings of {', '.join(PACKAGES)}, and {package} is not installed: "
            "pip install 'fusebert[tasks,bench]', or give --no-finetune"
        )
    root = Path(spec.submodule_search_locations[0])
    paths = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(paths)
    found: dict[str, Path] = {}
    for path in paths[:FILES]:
        try:
            texts = docstrings(path.read_bytes(), min_chars=SHORTEST)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for text in texts:
            if len(text) <= MIN_CHARS and package not in text.lower():
                found.setdefault(" ".join(text.split()), path.relative_to(root))
    return found


def finetuned_accuracy(
    model: Path, tables: Path, preset: str, seed: int, device: str, environment: Mapping[str, str]
) -> float:
    """The share of the test docstrings that a ``fusebert finetune`` of ``model`` classifies right.

    Args:
        model: a Hugging Face folder. The run is written beside it.
        tables: where `write_tables` wrote.
        preset: the model's name, which decides the learning rate; base's for another name.
        environment: of the process.

    Raises:
        UserError: the run failed, with its error.
    """
    out = model.with_name("finetuned")
    words = [
        *("--model", model, "--task", "classify", "--out", out, "--seqlen", SEQLEN, "--seed", seed),
        *(word for name in COUNTS for word in (f"--{name}", tables / f"{name}.jsonl")),
        *("--batch-size", BATCH_SIZE, "--epochs", EPOCHS, "--lr", LEARNING_RATES.get(preset, LEARNING_RATES["base"])),
        *("--layer-decay", LAYER_DECAY, "--device", device, "--no-tensorboard"),
    ]
    run_command("finetune", list(map(str, words)), environment)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return float(report["test"]["scores"]["accuracy"]["mean"])


def run_command(command: str, words: list[str], environment: Mapping[str, str]) -> None:
    """Runs ``fusebert COMMAND words`` in a process of its own.

    Raises:
        UserError: it failed, with its error.
    """
    begin = [sys.executable, "-m", "fusebert.train", command]
    done = subprocess.run([*begin, *words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{command}: {lines[-1].removeprefix('fusebert: error: ')}")
