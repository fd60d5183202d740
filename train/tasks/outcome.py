"""What a fine-tuning run gave: scores over the seeds, the best model, the report."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...model.atomic import replace_file
from ..run.strict_json import strict_json
from .finetune_report import write_report
from .job import Job
from .models import open_folder
from .scores import goodness


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        out: its folder.
        metric: that chose the models.
        results: of `train_seed`, in the order of the seeds.
        best: the best of them.
        test: scores of each seed's best model on the test texts; empty without --test.
    """

    out: Path
    metric: str
    results: list[dict[str, Any]]
    best: dict[str, Any]
    test: list[dict[str, float]]

    def means(self, split: str = "dev") -> dict[str, tuple[float, float | None]]:
        """(Mean, standard deviation over the seeds) of each score on "dev" or "test"; None with one seed."""
        found = {}
        scored = self.test if split == "test" else [each["scores"] for each in self.results]
        for name in scored[0]:
            values = [float("nan") if (x := each[name]) is None else x for each in scored]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            found[name] = float(np.mean(values)), spread
        return found

    def lines(self) -> list[str]:
        """The scores in words."""
        seeds = f", mean ± standard deviation of {len(self.results)} seeds" if len(self.results) > 1 else ""
        return [
            f"on the dev texts{seeds}:",
            *(f"  {name:10} {words}" for name, words in self.in_words().items()),
            self.chosen(),
            *([f"on the test texts{seeds}:"] if self.test else []),
            *(f"  {name:10} {words}" for name, words in (self.in_words("test") if self.test else {}).items()),
            f"model: {self.out / 'hf'}",
            f"report: {self.out / 'report.html'}",
        ]

    def in_words(self, split: str = "dev") -> dict[str, str]:
        """Mean and standard deviation of each score."""
        return {
            name: f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
            for name, (mean, spread) in self.means(split).items()
        }

    def chosen(self) -> str:
        """Which model is the best one."""
        return f"best by {self.metric}: seed {self.best['seed']}, epoch {self.best['best_epoch']:g}"


def conclude(job: Job, results: list[dict[str, Any]]) -> Outcome:
    """Copies the best seed's model to hf/ and writes the report about it."""
    out = job.settings.out
    best = max(results, key=lambda result: goodness(job.metric, result["scores"]))
    _link_folder(out / f"seed-{best['seed']}" / "hf", out / "hf")
    outcome = Outcome(out, job.metric, results, best, _test(job, results))
    predictions = job.task.predict(_load(job, out / "hf"), "dev")
    title = f"{job.settings.model}: {job.task.title}"
    tokens, seconds = sum(each["tokens"] for each in results), sum(each["seconds"] for each in results)
    facts = f"{tokens:,} tokens in {seconds:,.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s, evaluations included"
    figures = [[f"seed {each['seed']}, dev", *each["scores"].values()] for each in results]
    if len(results) > 1:
        figures.append(["mean ± standard deviation, dev", *outcome.in_words().values()])
    figures += [[f"seed {each['seed']}, test", *on.values()] for each, on in zip(results, outcome.test, strict=False)]
    if len(outcome.test) > 1:
        figures.append(["mean ± standard deviation, test", *outcome.in_words("test").values()])
    write_report(out, title, [f"{outcome.chosen()}.", facts], (["", *best["scores"]], figures), predictions)
    content = {
        "metric": job.metric,
        "best_seed": best["seed"],
        "scores": {name: {"mean": mean, "stdev": spread} for name, (mean, spread) in outcome.means().items()},
        "seeds": results,
        "test": {
            "scores": {name: {"mean": mean, "stdev": spread} for name, (mean, spread) in outcome.means("test").items()},
            "seeds": outcome.test,
        }
        if outcome.test
        else None,
        "classes": predictions.per_class(),
    }
    with replace_file(out / "report.json") as partial:
        partial.write_text(strict_json(content, indent=1) + "\n", encoding="utf-8")
    return outcome


def _load(job: Job, folder: Path) -> nn.Module:
    model, _ = job.task.make_model(open_folder(folder), trained=True)
    return model.to(job.machine.device)


def _test(job: Job, results: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The scores on --test of the best model of each seed."""
    if "test" not in job.task.splits:
        return []
    folders = [job.settings.out / f"seed-{each['seed']}" / "hf" for each in results]
    return [job.task.predict(_load(job, folder), "test").scores() for folder in folders]


def _link_folder(source: Path, target: Path) -> None:
    """A copy of a folder of files, by hard links where the file system has them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
