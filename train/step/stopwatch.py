"""Time between two points of a device's stream."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Measures the seconds from its creation to `stop`: with CUDA events on a GPU, with ``perf_counter`` on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start, self._end = self._now(), self._now()

    def stop(self) -> None:
        """Ends the measurement at the current point of the stream. Does not synchronise."""
        self._end = self._now()

    def seconds(self) -> float:
        """Seconds between creation and `stop`. Waits until a GPU has reached `stop`."""
        if isinstance(self._start, float) or isinstance(self._end, float):
            return float(self._end) - float(self._start)  # type: ignore[arg-type]
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
