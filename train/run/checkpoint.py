"""Checkpoints that are whole or not there: safetensors and JSON, no pickle.

    out/checkpoints/step-00000400/model.safetensors       parameters, under the model's own names
                                  optimizer.safetensors   "{parameter}/{state}": exp_avg, exp_avg_sq, step
                                  trainer.json            the rest, and every file's size and CRC-32; written last

No generator's state is among it: batches and dropout are functions of the seed and the number of the micro-batch.
Nor does anything tell how many processes there were: tensors are whole, gathered to the first process, which writes
and reads, and any number of processes can go on, replicated or in shards. (PyTorch's distributed checkpoint would write
the shards in parallel; its metadata is a pickle.)

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

from ...model.pretraining import BertForPreTraining
from ..errors import UserError
from ..step.distributed import Ranks, lost_connection
from ..step.sharding import gather, scatter

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 also had the generators' states, in rng.safetensors, and read its batches in one lane
FILES = ("model.safetensors", "optimizer.safetensors")


class CheckpointError(UserError):
    """A checkpoint is damaged, or is not one. The message is one line."""


@dataclasses.dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        step: optimisation steps done. batches: micro-batches consumed, by all ranks. tokens: real tokens seen.
        lanes: chunks that the batches are read from side by side, see `loader.batches`.
        elapsed_s: wall-clock seconds the run has taken. train_s, flops: those spent in steps alone, and their FLOPs.
        length: how long the run was to be, in steps or in minutes. finished: it reached that end.
        identity: what a continuation must share with the run (model, corpus, batch shape, ...).
        first_evaluation: held-out figures before the first step.
        loss_scale: fp16's, as GradScaler gives it.
    """

    step: int = 0
    batches: int = 0
    lanes: int = 1
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
    root: Path,
    model: BertForPreTraining,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    keep: int = 2,
    ranks: Ranks | None = None,
) -> Path:
    """Writes ``root``/step-N, N being ``state.step``, and removes all but the ``keep`` newest.

    Of ``ranks`` the first process writes, for which the others wait, so that it has the whole model and its moments in
    its memory, on the CPU, where they are sharded.

    Raises:
        OSError: no space left, for instance; the checkpoints already there are untouched.
    """
    ranks = ranks or Ranks()
    tensors = gather(model.state_dict(), ranks), gather(_optimizer_tensors(model, optimizer), ranks)
    return ranks.from_first(lambda: _write(root, tensors, state, keep))


def _write(root: Path, tensors: tuple[dict[str, Tensor], ...], state: TrainerState, keep: int) -> Path:
    final = root / f"step-{state.step:08d}"
    partial = root / f".{final.name}.partial-{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step-*"):  # of a process that died
        shutil.rmtree(leftover)
    partial.mkdir()
    try:
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
        if version not in READABLE:
            raise CheckpointError(f"{path} has format version {version}; this fusebert reads {READABLE}")
        state = TrainerState(**content["state"])
        for name in FILES:
            if _fingerprint(path / name) != files[name]:
                raise CheckpointError(f"{path / name} is damaged: its size or CRC-32 is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error})") from error
    return state


def load_checkpoint(
    path: Path, model: BertForPreTraining, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> None:
    """Puts a checkpoint's parameters and optimiser state in place; `read_state` has checked it.

    Of ``ranks`` the first process reads, and sends each of the others what it holds.

    Raises:
        CheckpointError: it is another model's.
    """
    from safetensors.torch import load_file

    ranks = ranks or Ranks()
    weights, moments = (load_file(path / name) if ranks.first else {} for name in FILES)
    parameters = dict(model.named_parameters())
    device = next(model.parameters()).device
    try:
        model.load_state_dict(scatter(weights, parameters.get, device, ranks))
        moments = scatter(moments, lambda name: parameters.get(name.rpartition("/")[0]), device, ranks)
        _load_optimizer(model, optimizer, moments)
    except (RuntimeError, KeyError) as error:
        if lost_connection(error):
            raise
        raise CheckpointError(f"{path} is of another model ({str(error).splitlines()[0]})") from error


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
    "save_checkpoint",
]
