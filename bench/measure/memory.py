"""GPU memory: the peak of a block of code, and giving back what is not used. No-ops on a CPU."""

from __future__ import annotations

import gc

import torch


class PeakMemory:
    """The most memory that a block held beyond what was held before it.

    Attributes:
        bytes: None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before


def release_memory(device: torch.device) -> None:
    """Collect garbage and return the allocator's unused blocks to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
