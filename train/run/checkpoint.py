"""Checkpoints in safetensors and JSON, written atomically, without pickle.

    out/checkpoints/step-00000400/model.safetensors       parameters, under the model's names
                                  optimizer.safetensors   "{parameter}/{state}": exp_avg, exp_avg_sq, step, average
                                  trainer.json            the rest, size and CRC-32 of the other files, its own CRC-32

Generator states are not saved: batches and dropout are functions of the seed and the number of the micro-batch. A
checkpoint does not depend on the number of processes: rank 0 gathers full tensors, writes and reads them, and any
number of processes can continue, replicated or sharded. (PyTorch's distributed checkpoint would write shards in
parallel, but its metadata is a pickle.)

A checkpoint is written to a hidden folder beside its final path, synced to disk and renamed, so a crash or a full disk
does not affect earlier checkpoints. Reading verifies size and CRC-32 of every file, every field and every weight before
anything is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ...model.atomic import replace_file, sync_directory
from ...model.hf.format import save_tensors
from ..errors import UserError
from ..step.average import KEY as AVERAGE
from ..step.distributed import Ranks, lost_connection
from ..step.finite import LARGEST, blown_up
from ..step.sharding import gather, scatter
from .strict_json import strict_json

FORMAT_VERSION = 3
# Version 1 has generator states in rng.safetensors, and its batches come from one lane. Versions 1 and 2 have no
# checksum of trainer.json and do not skip steps.
READABLE = (1, 2, 3)
LARGEST_JSON = 1 << 24  # bytes of trainer.json
FILES = ("model.safetensors", "optimizer.safetensors")
MAX_FLOAT32 = torch.finfo(torch.float32).max


class CheckpointError(UserError):
    """A checkpoint is damaged or not a checkpoint. The message is one line."""


class BlownUpWeights(UserError):
    """Weights or moments are not finite, or weights so large that products overflow. The message is one line."""


@dataclasses.dataclass
class TrainerState:
    """The progress of a run.

    Attributes:
        step: optimisation steps done.
        batches: micro-batches consumed by all ranks.
        phases: micro-batches consumed when the second phase of --seqlen began, the third, ….
        step_sizes: steps done when the second size of --batch-tokens began, the third, ….
        lanes: chunks that the batches are read from side by side, see `loader.batches`.
        skipped: steps, of those done, that changed nothing because loss or gradient was not finite.
        spikes: log lines with which a spike of the training loss began.
        tokens: real tokens seen.
        elapsed_s: wall-clock seconds of the run.
        train_s: seconds of the steps alone.
        flops: FLOPs of the steps.
        length: the length of the run as given, {"steps": ..., "minutes": ...}.
        finished: the run reached that length.
        identity: what must not change when the run is continued, see `resume.run_identity`.
        first_evaluation: `Evaluation.to_json` before the first step.
        loss_scale: state of GradScaler, in fp16.
        selection: the step of the best evaluation, its scores, and the number of evaluations since. In pretraining
            with --keep-best, and in fine-tuning.
    """

    step: int = 0
    batches: int = 0
    phases: list[int] = dataclasses.field(default_factory=list)
    step_sizes: list[int] = dataclasses.field(default_factory=list)
    lanes: int = 1
    skipped: int = 0
    spikes: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    train_s: float = 0.0
    flops: int = 0
    length: dict[str, Any] = dataclasses.field(default_factory=dict)
    finished: bool = False
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_evaluation: dict[str, Any] | None = None
    loss_scale: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None


def save_checkpoint(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    keep: int = 2,
    ranks: Ranks | None = None,
    spare: int | None = None,
) -> Path:
    """Writes ``root``/step-N with N = ``state.step``, and removes all but the ``keep`` newest checkpoints.

    A collective call: rank 0 writes and the others wait. Sharded tensors are gathered to the CPU memory of rank 0.

    Args:
        spare: the checkpoint of this step is kept, too.
        ranks: None: this process alone.

    Raises:
        BlownUpWeights: the weights or moments are not worth keeping. Nothing is written.
        OSError: for example no space left. Earlier checkpoints are not changed.
    """
    ranks = ranks or Ranks()
    check_weights(model, optimizer, ranks)
    tensors = gather(model.state_dict(), ranks), gather(_optimizer_tensors(model, optimizer), ranks)
    return ranks.from_first(lambda: _write(root, tensors, state, keep, spare))


def check_weights(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Raises BlownUpWeights in all ranks if a weight or moment of one rank is not usable. Waits for the device."""
    bad = blown_up(model.state_dict()) or blown_up(_optimizer_tensors(model, optimizer), limit=MAX_FLOAT32)
    if any(ranks.sum([float(bad is not None)])):
        raise BlownUpWeights(f"{bad or 'a tensor of another rank'} is not finite, or too large to compute with")


def _write(
    root: Path, tensors: tuple[dict[str, Tensor], ...], state: TrainerState, keep: int, spare: int | None
) -> Path:
    final = root / f"step-{state.step:08d}"
    partial, replaced = (root / f".{final.name}.{what}-{os.getpid()}" for what in ("partial", "replaced"))
    root.mkdir(parents=True, exist_ok=True)
    clean_up(root)
    partial.mkdir()
    try:
        files = {name: _write_tensors(partial / name, each) for name, each in zip(FILES, tensors, strict=True)}
        # As it will be read: null in place of numbers that are not finite.
        content = json.loads(strict_json({"state": dataclasses.asdict(state), "files": files}))
        content = {"version": FORMAT_VERSION, "crc32": _checksum(content), **content}
        with replace_file(partial / "trainer.json") as path:
            path.write_text(strict_json(content, indent=1), encoding="utf-8")
        if os.path.lexists(final):  # the step that the run was resumed from, saved again, or a damaged one
            os.rename(final, replaced)  # if the process is killed here, `clean_up` brings it back
        os.rename(partial, final)
    except BaseException:
        clean_up(root)
        raise
    sync_directory(root)
    _remove(replaced)
    # Those of later steps do not count: the run went on from an earlier one because they are damaged.
    for old in [path for path in list_checkpoints(root) if _step(path) <= state.step][keep:]:
        if _step(old) != spare:
            _remove(old)
    return final


def clean_up(root: Path) -> None:
    """Removes what killed processes left in ``root``, and restores a checkpoint that one was about to replace.

    Folders of other living processes are left alone.
    """
    for path in root.glob(".step-*"):
        match = re.fullmatch(r"\.(step-\d+)\.(partial|replaced)(?:-(\d+))?", path.name)
        if match is None or (match[3] and int(match[3]) != os.getpid() and _is_alive(int(match[3]))):
            continue
        if match[2] == "replaced" and not os.path.lexists(root / match[1]):
            os.rename(path, root / match[1])
        else:
            _remove(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    """Removes a folder, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in ``root``, newest first, not yet verified."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name)] if root.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_good(
    root: Path, check: Callable[[Path, TrainerState], None] | None = None
) -> tuple[Path, TrainerState] | None:
    """The newest undamaged checkpoint in ``root`` and its state; None if there is none. Warns of those it passes over.

    Args:
        check: raises CheckpointError for a state that `read_state` accepts and the caller cannot use.
    """
    for path in list_checkpoints(root):
        try:
            state = read_state(path)
            if check is not None:
                check(path, state)
            return path, state
        except CheckpointError as error:
            print(f"fusebert: warning: {error}; trying the one before", file=sys.stderr)
    return None


def last_good(root: Path) -> str:
    """Which checkpoint in ``root`` a run can continue from, in words for a message. Reads and verifies them."""
    found = newest_good(root)
    return "there is no good checkpoint" if found is None else f"the last good checkpoint is {found[0]}"


def read_state(path: Path) -> TrainerState:
    """Verifies all files of a checkpoint, its weights included, and returns its trainer state.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not finite.
    """
    try:
        with _open(path / "trainer.json") as file:
            content = json.loads(file.read(LARGEST_JSON))
        version, files = content["version"], content["files"]
        if version not in READABLE:
            raise CheckpointError(f"{path} has format version {version!r}; this fusebert reads {READABLE}")
        if version >= 3 and content["crc32"] != _checksum({"state": content["state"], "files": files}):
            raise CheckpointError(f"{path / 'trainer.json'} is damaged: its content differs from its checksum")
        state = _read_fields(content["state"])
        if state.step != _step(path):
            raise CheckpointError(f"{path / 'trainer.json'} is of step {state.step}")
        for name in FILES:
            if _fingerprint(path / name) != files[name]:
                raise CheckpointError(f"{path / name} is damaged: its size or CRC-32 differs from trainer.json")
            bad = _blown_up(path / name, LARGEST if name == FILES[0] else MAX_FLOAT32)
            if bad is not None:
                raise CheckpointError(f"{path / name} is not usable: {bad} is not finite, or too large to compute with")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if len(str(error)) < 200 else type(error).__name__
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason})") from error
    return state


def _read_fields(content: Any) -> TrainerState:
    """The state in trainer.json. Fields that an older version lacks have their default.

    Raises:
        TypeError, ValueError: a field is unknown or has a value that it cannot have.
    """
    state = TrainerState(**content)

    def is_number(value: Any, kind: type = float) -> bool:
        return type(value) in (int, kind) and 0 <= value < float("inf")

    def is_table(value: Any) -> bool:
        return isinstance(value, dict) and all(each is None or is_number(each) for each in value.values())

    evaluation = {"mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "num_masked", "num_pairs"}
    allowed = {
        **{
            name: is_number(getattr(state, name), int)
            for name in ("step", "batches", "skipped", "spikes", "tokens", "flops")
        },
        **{name: is_number(getattr(state, name)) for name in ("elapsed_s", "train_s")},
        "phases": isinstance(state.phases, list)
        and all(is_number(each, int) and each <= state.batches for each in state.phases)
        and state.phases == sorted(state.phases),
        "step_sizes": isinstance(state.step_sizes, list)
        and all(is_number(each, int) and each <= state.step for each in state.step_sizes)
        and state.step_sizes == sorted(state.step_sizes),
        "lanes": is_number(state.lanes, int) and state.lanes > 0,
        "length": is_table(state.length) and state.length.keys() <= {"steps", "minutes"},
        "finished": isinstance(state.finished, bool),
        "identity": isinstance(state.identity, dict),
        "first_evaluation": state.first_evaluation is None
        or (is_table(state.first_evaluation) and state.first_evaluation.keys() >= evaluation),
        "loss_scale": state.loss_scale is None or is_table(state.loss_scale),
        "selection": state.selection is None
        or (isinstance(state.selection, dict) and state.selection.keys() == {"step", "scores", "since"}),
    }
    wrong = [name for name, right in allowed.items() if not right]
    if wrong:
        raise ValueError(f"the value of {', '.join(wrong)} is not possible")
    return state


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> None:
    """Loads parameters and optimiser state from a checkpoint that `read_state` has verified.

    A collective call: rank 0 reads and sends the other ranks their tensors.

    Args:
        ranks: None: this process alone.

    Raises:
        CheckpointError: the checkpoint is of another model.
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


def weights_to_export(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint that `read_state` has verified: of a run with --ema, their averages."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    weights, averages = load_file(path / FILES[0]), {}
    with safe_open(path / FILES[1], framework="pt") as moments:
        names = set(moments.keys())
        averages = {name: moments.get_tensor(key) for name in weights if (key := f"{name}/{AVERAGE}") in names}
    return {**weights, **averages}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    # In PyTorch's state dict the parameters are numbered in the order of the groups.
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: i for i, name in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}  # empty before the first step
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(number[name], {})[key] = tensor
    if state and state.keys() != set(number.values()):
        raise KeyError("the optimiser's state does not have all parameters")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Writes a safetensors file and returns its size and CRC-32."""
    with replace_file(path) as partial:
        save_tensors(partial, tensors, {})
    return _fingerprint(path)


def _blown_up(path: Path, limit: float) -> str | None:
    """`finite.blown_up` of a safetensors file, with one tensor at a time in memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if blown_up({name: file.get_tensor(name)}, limit):
                    return str(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    return None


def _open(path: Path) -> BinaryIO:
    """Opens a regular file; a FIFO, which could block for ever, is an OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a file")
    return open(handle, "rb")


def _fingerprint(path: Path) -> dict[str, int]:
    size = crc = 0
    with _open(path) as file:
        while block := file.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}
