"""Checkpoints that are whole or not there: safetensors and JSON, no pickle.

    out/checkpoints/step-00000400/model.safetensors       parameters, under the model's own names
                                  optimizer.safetensors   "{parameter}/{state}": exp_avg, exp_avg_sq, step
                                  rng.safetensors         uint8, the generators of the CPU and of the GPU
                                  trainer.json            the rest, and every file's size and CRC-32; written last

A checkpoint is written into a hidden sibling, synced to disk and renamed, so a crash or a full disk leaves the ones
before it as they were. Reading checks size and CRC-32 of every file before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.pretraining import BertForPreTraining
from .errors import UserError

FORMAT_VERSION = 1
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


class CheckpointError(UserError):
    """A checkpoint is damaged, or is not one. The message is one line."""


@dataclasses.dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        step: optimisation steps done. batches: micro-batches consumed. tokens: real tokens seen.
        elapsed_s: wall-clock seconds the run has taken. train_s, flops: those spent in steps alone, and their FLOPs.
        length: how long the run was to be, in steps or in minutes. finished: it reached that end.
        identity: what a continuation must share with the run (model, corpus, batch shape, ...).
        first_evaluation: held-out figures before the first step.
        loss_scale: fp16's, as GradScaler gives it.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    train_s: float = 0.0
    flops: int = 0
    length: dict[str, Any] = dataclasses.field(default_factory=dict)
    finished: bool = False
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_evaluation: dict[str, Any] | None = None
    loss_scale: dict[str, Any] | None = None


def save_checkpoint(
    root: Path, model: BertForPreTraining, optimizer: torch.optim.Optimizer, state: TrainerState, keep: int = 2
) -> Path:
    """Writes ``root``/step-N, N being ``state.step``, and removes all but the ``keep`` newest.

    Raises:
        OSError: no space left, for instance; the checkpoints already there are untouched.
    """
    final = root / f"step-{state.step:08d}"
    partial = root / f".{final.name}.partial-{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step-*"):  # of a process that died
        shutil.rmtree(leftover)
    partial.mkdir()
    try:
        tensors = (model.state_dict(), _optimizer_tensors(model, optimizer), _rng_tensors())
        files = {name: _write_tensors(partial / name, each) for name, each in zip(FILES, tensors, strict=True)}
        content = {"version": FORMAT_VERSION, "state": dataclasses.asdict(state), "files": files}
        with open(partial / "trainer.json", "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(partial)
        if final.exists():  # the step a run was resumed from, saved again
            os.rename(final, partial.with_suffix(".replaced"))
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_directory(root)
    for old in [*list_checkpoints(root)[keep:], *root.glob(".step-*")]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in ``root``, newest first; whether they are sound shows when they are read."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_state(path: Path) -> TrainerState:
    """The trainer's state in a checkpoint, all of whose files have been checked.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        content = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        version, files = content["version"], content["files"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {version}; this fusebert reads {FORMAT_VERSION}")
        state = TrainerState(**content["state"])
        for name in FILES:
            if _fingerprint(path / name) != files[name]:
                raise CheckpointError(f"{path / name} is damaged: its size or CRC-32 is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error})") from error
    return state


def load_checkpoint(path: Path, model: BertForPreTraining, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's parameters and optimiser state in place; `read_state` has checked it.

    Raises:
        CheckpointError: it is another model's.
    """
    from safetensors.torch import load_file

    weights, moments = (load_file(path / name) for name in FILES[:2])
    try:
        model.load_state_dict(weights)
        _load_optimizer(model, optimizer, moments)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} is of another model ({str(error).splitlines()[0]})") from error


def restore_generators(path: Path) -> None:
    """Puts PyTorch's generators where they were at a checkpoint. Whatever else draws from them must come before: a
    DataLoader does, when it begins."""
    from safetensors.torch import load_file

    rng = load_file(path / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _optimizer_tensors(model: BertForPreTraining, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizer(model: BertForPreTraining, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    # PyTorch's state dict numbers the parameters in the order of the groups.
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    keys = ("step", "exp_avg", "exp_avg_sq") if tensors else ()  # before the first step there is no state
    state = {i: {key: tensors[f"{name}/{key}"] for key in keys} for i, name in enumerate(ordered) if keys}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _rng_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Writes and syncs a safetensors file; its size and CRC-32.

    Raises:
        OSError: safetensors reports the system's error in words; here it is what it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _fingerprint(path)


def _fingerprint(path: Path) -> dict[str, int]:
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def _sync_directory(path: Path) -> None:
    """Makes the names in a directory durable (a no-op where directories can't be opened, as on Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "CheckpointError",
    "TrainerState",
    "list_checkpoints",
    "load_checkpoint",
    "read_state",
    "restore_generators",
    "save_checkpoint",
]
