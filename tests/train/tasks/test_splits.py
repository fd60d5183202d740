"""The dev and the test texts of a task are two: each is scored by its own name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fusebert.train.tasks.job import prepare_job
from fusebert.train.tasks.models import choose_machine, open_folder
from fusebert.train.tasks.settings import FinetuneSettings


def losses(place: Path, task: str, dev: str, test: str | None, **options: Any) -> dict[str, float]:
    """The loss of a model before its training on each split."""
    files = {"train": [str(place / dev)], "dev": str(place / dev), "test": test and str(place / test)}
    settings = FinetuneSettings(
        model=place / "model", task=task, out=place / "splits", device="cpu", **{**files, **options}
    )
    job = prepare_job(settings, choose_machine(settings), open_folder(settings.model))
    model, _ = job.model(0)
    return {split: job.task.predict(model, split).scores()["loss"] for split in job.task.splits}


@pytest.mark.parametrize(
    ("task", "one", "other", "options"),
    [
        ("classify", "train.tsv", "dev.tsv", {}),
        ("regress", "train.jsonl", "dev.jsonl", {"text": "two", "label": "score"}),
        ("tag", "train.conll", "dev.conll", {}),
        ("qa", "train.json", "dev.json", {}),
        ("embed", "pairs-train.tsv", "pairs-dev.tsv", {}),
    ],
)
def test_each_split_is_scored_on_its_own_texts(
    place: Path, task: str, one: str, other: str, options: dict[str, Any]
) -> None:
    both = losses(place, task, one, other, **options, train=[str(place / one)])
    alone = losses(place, task, other, None, **options, train=[str(place / one)])
    assert list(both) == ["dev", "test"]
    assert list(alone) == ["dev"]
    assert math.isclose(both["test"], alone["dev"], rel_tol=1e-6)
    assert not math.isclose(both["dev"], both["test"], rel_tol=1e-6)
