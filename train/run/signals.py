"""SIGINT and SIGTERM during a run: finish the step, save, stop."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """The run was stopped by a signal. The message says how to continue it."""


class StopSignal:
    """Notes SIGINT and SIGTERM within a ``with`` block. The second signal has its default effect, at once.

    Args:
        silent: print no message. For the processes of a torchrun job, which first have to agree to stop.

    Attributes:
        received: a signal came.
        armed: there is something to save. Until then a signal raises `Interrupted` at once.
    """

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.received = False
        self.armed = False
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != self._pid:  # a worker process inherited this handler: end it
            os.kill(os.getpid(), number)
        if not self.armed:
            raise Interrupted("stopped before the first step: there is nothing to save")
        self.received = True
        if not self.silent:  # os.write, because print is not reentrant
            os.write(2, b"\nfinishing the step, then saving; once more to stop at once\n")
