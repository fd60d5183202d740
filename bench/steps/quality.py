"""Training recipes against each other: how many tokens and seconds until a held-out loss.

A run is ``fusebert pretrain`` in a process of its own, with the recipe's options and a seed, which decides the first
weights and the order of the text. Recipes take turns, so that changes of the machine's speed affect all of them. The
held-out loss is always measured with BERT's masking (15 %, 80/10/10), whatever the training masks. Then each model is
fine-tuned on one task (`quality_task`), so that a recipe cannot win by the loss alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...train.corpus.reader import Corpus
from ...train.errors import UserError
from ...train.run.log import read_log
from ..measure.machine import environment
from ..measure.result import (
    CorpusSummary,
    QualityPoint,
    QualityRecipe,
    QualityResult,
    QualityRun,
    read_result,
    write_result,
)
from ..measure.settings import QualityOptions, QualitySettings, settings_of
from .quality_task import finetuned_accuracy, run_command, write_tables

EVALUATIONS = 30  # of a run: the loss at a number of tokens is interpolated between them


def parse(recipes: str) -> dict[str, list[str]]:
    """Words of ``fusebert pretrain`` for each recipe, by its name: "bert; fast, steps=100, cautious-decay".

    Raises:
        UserError: a part is not ``option=value`` or ``option``, or a recipe is there twice.
    """
    found: dict[str, list[str]] = {}
    for recipe in filter(None, (part.strip() for part in recipes.split(";"))):
        # A value such as 128:0.9,512 has commas too; an option begins with a letter.
        name, *options = (word.strip() for word in re.split(r",(?=\s*[a-zA-Z])", recipe))
        words = [f"--recipe={name}"]
        for option in options:
            key, equals, value = (word.strip() for word in option.partition("="))
            if not re.fullmatch(r"[a-z][a-z_-]*", key):
                raise UserError(f"--recipes {recipe!r}: {option!r} must be option=value, as in 'fast, steps=100'")
            words.append(f"--{key.replace('_', '-')}{equals}{value}")
        title = ", ".join([name, *options])
        if title in found:
            raise UserError(f"--recipes: {title!r} is there twice")
        found[title] = words
    if not found:
        raise UserError("--recipes is empty: give 'bert; fast', for example")
    return found


def run(options: QualityOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> QualityResult:
    """Run the benchmark, show what it finds, and return (and write) the result.

    Args:
        show: takes the environment, a line a run, and the result.

    Raises:
        UserError: an option is not allowed, ``options.resume`` is given for runs of another kind, or a run failed: with
            its error.
        CorpusError: ``options.data`` is not a corpus, or is damaged.
    """
    begin = time.monotonic()
    recipes = parse(options.recipes)
    corpus = Corpus.open(Path(options.data))
    where = environment(device)
    show(where)
    result = QualityResult(
        environment=where,
        settings=settings_of(QualitySettings, options, data=Path(options.data).name),
        corpus=CorpusSummary(corpus.vocab_size, corpus.split("train").num_tokens),
        unigram_entropy=corpus.unigram_entropy,
    )
    words = {**_continued(result, options), **recipes}
    runs = {name: [run for recipe in result.recipes if recipe.name == name for run in recipe.runs] for name in words}
    with tempfile.TemporaryDirectory(prefix="fusebert-quality-") as place:
        if options.finetune:
            write_tables(Path(place))
        for seed in range(options.seeds):
            for number, (name, given) in enumerate(recipes.items()):
                if any(run.seed == seed for run in runs[name]):
                    continue
                made, result.device = _pretrain(given, options, seed, device, Path(place) / f"{number}-{seed}")
                runs[name].append(made)
                result.recipes = [QualityRecipe(n, shlex.join(words[n]), tuple(r)) for n, r in runs.items() if r]
                if options.out is not None:
                    write_result(options.out, result)
                last, accuracy = made.last, made.finetuned_accuracy
                show(
                    f"{name}, seed {seed}: held-out loss {last.mlm_loss:.3f} after {last.tokens:,} tokens in "
                    f"{last.seconds:.0f} s" + (f"; accuracy {accuracy:.1%} after fine-tuning" if accuracy else "")
                )
    result.seconds = time.monotonic() - begin
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result


def _continued(result: QualityResult, options: QualityOptions) -> dict[str, list[str]]:
    """Puts the recipes of the file of --out, with their runs, into ``result``, and returns their words.

    Raises:
        UserError: --out is missing, or its runs do not compare with those of ``options``.
    """
    if not options.resume:
        return {}
    if options.out is None:
        raise UserError("--resume continues the file of --out: give --out")
    if not options.out.exists():
        return {}
    before = read_result(options.out, QualityResult)

    def kind(one: QualityResult) -> dict[str, Any]:
        where, settings = one.environment, dataclasses.asdict(one.settings)
        del settings["recipes"], settings["seeds"]
        found = {f"--{name}": value for name, value in settings.items()}
        found |= {"corpus": one.corpus, "commit": where.commit, "versions": where.versions}
        return found | {"device": where.device_name}

    now = kind(result)
    for name, value in kind(before).items():
        if now[name] != value:
            raise UserError(
                f"--resume: the runs in {options.out} have another {name} ({value} there, {now[name]} here): give "
                "another --out"
            )
    result.recipes, result.device = before.recipes, before.device
    names = [recipe.name for recipe in before.recipes]
    names += [name for name in parse(options.recipes) if name not in names]
    seeds = max(before.settings.seeds, options.seeds)
    result.settings = dataclasses.replace(result.settings, recipes="; ".join(names), seeds=seeds)
    return {recipe.name: shlex.split(recipe.options) for recipe in before.recipes}


def _pretrain(
    words: list[str], options: QualityOptions, seed: int, device: torch.device, out: Path
) -> tuple[QualityRun, str]:
    """A run, and its device in words."""
    steps = next((int(word.partition("=")[2]) for word in words if word.startswith("--steps=")), options.steps)
    given = [
        f"--data={options.data}",
        f"--out={out}",
        f"--model={options.model}",
        f"--steps={steps}",
        f"--seed={seed}",
        f"--device={device.type}",
        f"--eval-every={max(1, steps // EVALUATIONS)}",
        f"--save-every={steps}",
        f"--log-every={max(1, steps // EVALUATIONS)}",
        "--no-tensorboard",
    ]
    environment: Mapping[str, str] = {**os.environ, "PYTHONSAFEPATH": "1"}
    run_command("pretrain", [*given, *words], environment)
    records = read_log(out / "log.jsonl")
    about = json.loads((out / "report.json").read_text(encoding="utf-8"))
    tokens = {0: 0, **{record["step"]: record["tokens"] for record in records if record["kind"] == "train"}}
    evaluations = [record for record in records if record["kind"] == "eval"]
    spent, points = 0.0, list[QualityPoint]()
    first = evaluations[0]["elapsed_s"]
    for record in evaluations:
        if points:
            spent += record["seconds"]  # of this evaluation, which the clock has counted
        points.append(
            QualityPoint(
                step=record["step"],
                tokens=tokens[record["step"]],
                seconds=record["elapsed_s"] - first - spent,
                mlm_loss=record["mlm_loss"],
                nsp_accuracy=record["nsp_accuracy"],
            )
        )
    accuracy = None
    if options.finetune:
        accuracy = finetuned_accuracy(out / "hf", out.parent, about["model"], seed, device.type, environment)
    return QualityRun(seed, tuple(points), accuracy), about["device"]
