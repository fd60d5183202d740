"""SIGINT, SIGTERM and SIGUSR1 during a run: finish the step, save, stop.

Slurm sends SIGTERM before it pre-empts a job, and SIGUSR1 if asked to (``--signal``). A run that was stopped by one of
them has done what it was told, so its exit status is 0. After Ctrl-C (SIGINT) it is 130, as usual.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOCAL_RUN_ID = "fusebert"  # torchrun's variable TORCHELASTIC_RUN_ID in the processes of `local_ranks`
armed_flag = mmap.mmap(-1, 1)  # shared with forked processes: 1 if `StopSignal.arm` was called in one of them


def is_local_rank() -> bool:
    """Whether `local_ranks.start_ranks` started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == LOCAL_RUN_ID


def exit_status(interrupted: bool) -> int:
    """The exit status of a run that was stopped by Ctrl-C (``interrupted``) or by another signal."""
    return 128 + signal.SIGINT if interrupted else 0


class Stopped(Exception):
    """An evaluation was broken off because of a signal.

    Attributes:
        interrupted: by Ctrl-C.
    """

    def __init__(self, interrupted: bool) -> None:
        super().__init__("stopped")
        self.interrupted = interrupted


class Interrupted(Exception):
    """The run was stopped by a signal. The message says how to continue it.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StopSignal:
    """Handles SIGINT, SIGTERM and SIGUSR1 within a ``with`` block.

    Until it is `armed` there is nothing to save, and a signal ends the process at once. Then the first signal is noted,
    and the second has its default effect, at once. The handler never raises: an exception between any two instructions
    could be lost, or leave half-started workers behind.

    The processes of `local_ranks` have a parent that passes one signal on, to rank 0, when it is armed; the others it
    handles itself. So only that one counts: a batch system may send each signal to all processes.

    Args:
        silent: print no message. For the processes of a torchrun job, which first have to agree to stop.

    Attributes:
        received: the signal that came, or None.
        armed: there is something to save.
    """

    def __init__(self, silent: bool = False) -> None:
        self._has_parent = is_local_rank()
        self._deaf = self._has_parent and os.environ["RANK"] != "0"
        self.silent = silent and not self._has_parent
        self.received: int | None = None
        self.armed = False
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def share(self) -> list[float]:
        """Two numbers to sum over the ranks: whether SIGINT came to this one, whether another signal came."""
        return [float(self.received == signal.SIGINT), float(self.received not in (None, signal.SIGINT))]

    def arm(self) -> None:
        """From now on there is something to save."""
        self.armed = True
        armed_flag[0] = 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        in_worker = os.getpid() != self._pid  # a worker process inherited this handler: end it
        if self._has_parent and not in_worker and (self._deaf or not self.armed or self.received is not None):
            return
        if in_worker or not self._has_parent:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)
        if in_worker:
            os.kill(os.getpid(), number)
        # os.write, because print is not reentrant.
        if not self.armed:
            if not self.silent:
                os.write(2, b"\nfusebert: stopped before the first step: there is nothing to save\n")
            os._exit(exit_status(number == signal.SIGINT))
        self.received = number
        if not self.silent:
            os.write(2, b"\nfinishing the step, then saving; once more to stop at once\n")


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM, which a batch system sends, into SystemExit, so that temporary files are removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
