"""What a memory instruction touches: sectors of global memory, banks of shared memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from .sass import WARP, Instruction

SECTOR = 32  # bytes: the unit of global memory traffic
BANKS = 32  # of shared memory, 4 bytes wide


@dataclasses.dataclass(frozen=True)
class Region:
    """A tensor of the launch. ``values``: its bytes, of an integer tensor, where they decide the path."""

    name: str
    start: int
    size: int
    values: np.ndarray | None = None


@dataclasses.dataclass
class Traffic:
    """What a memory instruction did, summed over its executions by a block's warps.

    Attributes:
        requests: of warps with at least one active thread.
        thread_bytes: of active threads.
        units: global memory: sectors of 32 bytes; shared memory: cycles of 128 bytes, more where banks conflict.
        assumed: requests with an address that is not known, taken as coalesced.
    """

    requests: int = 0
    thread_bytes: int = 0
    units: int = 0
    assumed: int = 0


def fresh_sectors(address: Any, mask: np.ndarray) -> int:
    """Distinct sectors of each warp's request, summed over the warps.

    Args:
        address, mask: [threads].
    """
    far = np.uint64(0xFFFFFFFFFFFFFFFF)
    sectors = np.sort(np.where(mask, address // np.uint64(SECTOR), far).reshape(-1, WARP), axis=1)
    fresh = np.ones_like(sectors, bool)
    fresh[:, 1:] = sectors[:, 1:] != sectors[:, :-1]
    return int((fresh & (sectors != far)).sum())


def bank_cycles(address: Any, mask: np.ndarray, x: Instruction) -> int:
    """Cycles that shared memory needs for a request of each warp.

    A cycle serves 32 banks of 4 bytes. Accesses of 8 and 16 bytes are served for 16 and 8 threads at a time, matrices
    of LDSM and STSM for the 8 threads that hold the addresses of their rows.

    Args:
        address, mask: [warps, 32].
    """
    base = address.min() // np.uint64(128) * np.uint64(128)
    matrices = x.words[0] in ("LDSM", "STSM")
    return _bank_cycles((address - base).tobytes(), mask.tobytes(), x.access_bytes, matrices)


@functools.lru_cache(maxsize=4096)
def _bank_cycles(offsets: bytes, used_lanes: bytes, size: int, matrices: bool) -> int:
    address, mask = np.frombuffer(offsets, np.uint64).reshape(-1, WARP), np.frombuffer(used_lanes, bool)
    mask = mask.reshape(-1, WARP)
    if matrices:
        lanes = np.arange(WARP) < 8 * (size // 4)
        mask, size = mask & lanes, 16
    together = min(WARP, BANKS * 4 // size)  # threads served at a time
    total = 0
    for words, used in zip(address // np.uint64(4), mask, strict=True):
        for first in range(0, WARP, together):
            part = used[first : first + together]
            if not part.any():
                continue
            start = np.unique(words[first : first + together][part])
            touched = np.unique((start[:, None] + np.arange(max(1, size // 4), dtype=np.uint64)).ravel())
            total += int(np.bincount((touched % np.uint64(BANKS)).astype(np.int64), minlength=BANKS).max())
    return total
