"""The run's log: one JSON object a line in log.jsonl, and TensorBoard scalars if TensorBoard is installed.

Every record has "kind" ("run", "train", "eval", "skip" or "spike") and "step".
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, Protocol

from ...model.atomic import replace_file
from .strict_json import strict_json


class ScalarWriter(Protocol):
    """The methods of TensorBoard's SummaryWriter that the log uses."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Appends records to ``directory``/log.jsonl, without buffering.

    Args:
        resume_step: keep the existing records up to this step and append to them; None removes all.
        tensorboard: whether to write TensorBoard files; None: if TensorBoard is installed.

    Raises:
        ModuleNotFoundError: ``tensorboard`` is True and TensorBoard is not installed.
    """

    def __init__(self, directory: Path, *, resume_step: int | None, tensorboard: bool | None) -> None:
        self.path = directory / "log.jsonl"
        kept = [r for r in read_log(self.path) if r["step"] <= resume_step] if resume_step is not None else []
        with replace_file(self.path) as partial:
            partial.write_text("".join(strict_json(record) + "\n" for record in kept), encoding="utf-8")
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._tensorboard = _tensorboard_writer(directory / "tensorboard", resume_step, tensorboard)

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Appends a record. The numbers in ``fields`` also become TensorBoard scalars ``kind/name``.

        Raises:
            OSError: the record is not written, and the file has whole lines only: no space is left, for example, or
                the file was deleted or replaced.
        """
        self._append((strict_json({"kind": kind, "step": step, **fields}) + "\n").encode())
        if self._tensorboard is not None:
            for name, value in fields.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file.fileno())
        try:
            same = os.path.samestat(before, self.path.stat())
        except OSError:
            same = False
        if not same:
            raise FileNotFoundError(errno.ENOENT, "deleted or replaced during the run", str(self.path))
        try:
            written = self._file.write(line)
            if written < len(line):  # the disk has space for a part of it
                self._file.write(line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before.st_size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # `write` raised it before
                self._tensorboard.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, without damaged lines; an empty list if there is no file."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_whole(record):
            records.append(record)
    return records


def _is_whole(record: Any) -> bool:
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    if record.get("kind") not in ("train", "eval"):
        return isinstance(record.get("kind"), str)
    return type(record.get("mlm_loss", "")) in (int, float, type(None))


def _tensorboard_writer(directory: Path, resume_step: int | None, wanted: bool | None) -> ScalarWriter | None:
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise ModuleNotFoundError("--tensorboard needs TensorBoard: pip install tensorboard") from error
        return None
    purge_step = resume_step + 1 if resume_step is not None else None
    return SummaryWriter(str(directory), purge_step=purge_step)
