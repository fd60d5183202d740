"""Figures on their way from the device to the host, which does not wait for them."""

from __future__ import annotations

import collections

import torch
from torch import Tensor


class Readback:
    """A copy of ``values`` (1-D), made when the device gets there; and when that was."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether `values` would not wait."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The values; waits for the device where they are not here yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Leash:
    """Keeps the host at most ``steps`` steps ahead of the device: enough that it never waits for the host, and few
    enough that the clock, a signal or a loss that is not finite is not seen a minute late."""

    def __init__(self, device: torch.device, steps: int = 8) -> None:
        self._steps = steps
        self._on_gpu = device.type == "cuda"
        self._events: collections.deque[torch.cuda.Event] = collections.deque()

    def step(self) -> None:
        """After each step. Waits only for one that lies ``steps`` back."""
        if not self._on_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > self._steps:
            self._events.popleft().synchronize()
