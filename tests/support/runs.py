"""Small pretraining runs, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fusebert.train.run.log import read_log

# On the CPU, where a continued run gives the same bits.
SMALL: dict[str, Any] = {
    "model": "tiny",
    "seqlen": 32,
    "tokens_per_batch": 256,
    "device": "cpu",
    "log_every": 1,
    "eval_every": 1000,
    "threads": 1,
    "tensorboard": False,
}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """The log's records of one kind."""
    return [record for record in read_log(out / "log.jsonl") if record["kind"] == kind]


def weights(out: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def command_line(**settings: Any) -> list[str]:
    """Words of ``fusebert pretrain`` for ``settings``."""
    given = {name: value for name, value in settings.items() if name != "tensorboard"}
    return ["pretrain", "--no-tensorboard", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
