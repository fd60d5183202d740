"""Times contestants against each other in interleaved bursts.

A burst is one contestant's calls, back to back, between two time stamps (CUDA events on a GPU, ``perf_counter`` on a
CPU). Bursts of all contestants alternate, in a new order each round, so that changes of the machine (clocks,
temperature, other processes) affect all of them alike. Ratios are taken within a round (see `statistics`).

On a GPU three effects would falsify a burst:
- the launch. Reads of a large buffer are queued first, so that the host is ahead when the first time stamp passes. With
  ``device_time`` they last as long as the host needs for the whole burst: operators are then timed as in a CUDA graph,
  and the host's time is reported separately.
- the L2. The buffer evicts it, and calls walk through several sets of inputs that together exceed it. (Evicting by
  writing would leave dirty lines that the timed kernel must write back.)
- the edges. The last writes stay in the L2 beyond the second time stamp. The burst is long enough to make that small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ...train.step.stopwatch import Stopwatch
from .statistics import Timing

WARMUP_CALLS = 3
LONGEST_LEAD_MS = 20.0  # of the host over the device
MIN_ROUNDS, MAX_ROUNDS = 7, 60
BURST_MS = {"cuda": 3.0, "cpu": 2.0}
MAX_CALLS_PER_BURST = 24


@dataclasses.dataclass(frozen=True)
class Work:
    """Calls to be timed.

    Attributes:
        run: the timed call; its argument is what ``prepare`` returned.
        prepare: called untimed with the number of the call. Picks the set of inputs and, for a backward alone, builds
            the graph.
        context: entered around each burst, for settings such as a forced backend.
        max_calls: the most calls in a burst, where each call holds memory.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda index: index
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    max_calls: int = MAX_CALLS_PER_BURST


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's last-level cache; 64 MiB, more than a Hopper's, where PyTorch does not report it."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


class _Bursts:
    """Times bursts on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = max(4 * l2_bytes(device), 256 << 20)
            self._evict = torch.ones(size // 4, dtype=torch.int32, device=device)
            self._read_ms = 0.0
            self._read_ms, _ = self.burst(Work(lambda _: self._evict.amax()), 0, 4)

    def _reads(self, lead_ms: float) -> int:
        """The number of reads of the buffer that last so long, at least one."""
        return 1 + math.ceil(min(lead_ms, LONGEST_LEAD_MS) / self._read_ms) if self._read_ms else 1

    def burst(self, work: Work, first_call: int, calls: int, lead_ms: float = 0.0) -> tuple[float, float]:
        """Time ``calls`` calls.

        Args:
            lead_ms: how long the device is kept busy before the first call.

        Returns:
            Milliseconds a call, and milliseconds that the host needed to issue a call; equal on a CPU.
        """
        states = [work.prepare(first_call + i) for i in range(calls)]
        on_gpu = self.device.type == "cuda"
        with work.context():
            if on_gpu:
                torch.cuda.synchronize(self.device)
                for _ in range(self._reads(lead_ms)):
                    self._evict.amax()
            stopwatch = Stopwatch(self.device)
            begin = time.perf_counter()
            for state in states:
                work.run(state)
            host = time.perf_counter() - begin
            stopwatch.stop()
            elapsed = stopwatch.seconds()
            return 1e3 * elapsed / calls, 1e3 * (host if on_gpu else elapsed) / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleave(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    seconds: float,
    calls: int | None = None,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    device_time: bool = False,
) -> dict[str, Timing]:
    """Time all contestants in alternation, for about ``seconds`` in total after warming up.

    A few untimed calls compile and fill the allocator's cache. Python's garbage collector is off while timing.

    Args:
        calls: calls in every burst; None: for each contestant as many as last a few milliseconds.
        min_rounds: run even when they take longer than ``seconds``.
        device_time: exclude the host's time on a GPU (see above). False: delays by the host count, as in training.

    Returns:
        A `Timing` for each name, all with the same rounds.
    """
    bursts = _Bursts(device)
    burst_calls: dict[str, int] = {}
    lead_ms: dict[str, float] = {}
    for name, work in works.items():
        for i in range(WARMUP_CALLS):
            bursts.burst(work, i, 1)
        estimate, _ = bursts.burst(work, WARMUP_CALLS, 1)
        wanted = math.ceil(BURST_MS.get(device.type, 2.0) / max(estimate, 1e-6))
        n = burst_calls[name] = calls if calls is not None else max(1, min(wanted, work.max_calls))
        lead_ms[name] = 1.5 * n * bursts.burst(work, WARMUP_CALLS + 1, n)[1] if device_time else 0.0

    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    order = random.Random(0)
    names = list(works)
    deadline = time.monotonic() + seconds
    with _no_garbage_collection():
        for done in range(max_rounds):
            if done >= min_rounds and time.monotonic() >= deadline:
                break
            order.shuffle(names)
            for name in names:
                n = burst_calls[name]
                samples[name].append(bursts.burst(works[name], done * n, n, lead_ms[name]))
    return {
        name: Timing.of([s for s, _ in pairs], [h for _, h in pairs], burst_calls[name])
        for name, pairs in samples.items()
    }
