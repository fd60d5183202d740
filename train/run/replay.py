"""The micro-batches of a step as a file, to repeat a step that failed.

    out/nonfinite/step-00000012.rank-0.safetensors    "{i}/{field}" of micro-batch i; numbers in the header

With the last checkpoint, which has the weights of that step:

    window, seeds = load_window(path)
    step(window, lr, seeds=seeds)      # a `step.TrainingStep`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...model.atomic import replace_file
from ...model.batch import PackedBatch
from ...model.hf.format import save_tensors


def save_window(path: Path, window: Sequence[PackedBatch], seeds: Sequence[int]) -> Path:
    """Writes the micro-batches of a step and their dropout seeds to ``path``, which it returns."""
    tensors: dict[str, Tensor] = {}
    numbers = []
    for i, batch in enumerate(window):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        tensors |= {f"{i}/{name}": each.contiguous() for name, each in fields.items() if isinstance(each, Tensor)}
        numbers.append({name: each for name, each in fields.items() if not isinstance(each, Tensor)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as partial:
        save_tensors(partial, tensors, {"numbers": json.dumps(numbers), "seeds": json.dumps(list(seeds))})
    return path


def load_window(path: Path) -> tuple[list[PackedBatch], list[int]]:
    """The micro-batches and seeds that `save_window` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        numbers, seeds = (json.loads(file.metadata()[name]) for name in ("numbers", "seeds"))
    window = []
    for i, each in enumerate(numbers):
        own = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{i}/")}
        window.append(PackedBatch(**own, **each))
    return window, seeds
