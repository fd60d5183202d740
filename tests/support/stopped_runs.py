"""A signal that stops a training run at a chosen step."""

import signal

from fusebert.train.run.signals import StopSignal


class StopAfter(StopSignal):
    """A signal that comes after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        super().__init__()

    @property
    def received(self) -> int | None:
        self._left -= 1
        return signal.SIGTERM if self._left < 0 else None

    @received.setter
    def received(self, value: int | None) -> None: ...
