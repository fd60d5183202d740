"""A block's shared memory as far as it is known: what decides a branch or an address may pass through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .integers import Value, u64

SIZE = 1 << 18  # bytes, more than a block can have
SYSTEM_BYTES = 1 << 10  # the first, of sm_100: which columns of tensor memory are taken, at first none

COMBINE: dict[str, Callable[[int, int], int]] = {
    "AND": lambda a, b: a & b,
    "OR": lambda a, b: a | b,
    "XOR": lambda a, b: a ^ b,
    "ADD": lambda a, b: (a + b) & 0xFFFFFFFF,
    "EXCH": lambda a, b: b,
}


class SharedMemory:
    """Bytes, and which of them are known. Addresses are arrays with an element a thread.

    Args:
        zeros: bytes at the start that are known to be 0.
    """

    def __init__(self, zeros: int = 0) -> None:
        self._bytes = np.zeros(SIZE, np.uint8)
        self._known = np.zeros(SIZE, bool)
        self._known[:zeros] = True
        self._program_starts = zeros

    def forget(self) -> None:
        """After a store of the program to an unknown address nothing is known but the system's own part."""
        self._known[self._program_starts :] = False

    @staticmethod
    def _place(address: Any) -> np.ndarray:
        return ((address & np.uint64(0xFFFFFF)) % np.uint64(SIZE - 16)).astype(np.int64)

    def store(self, address: Any, mask: np.ndarray, words: Sequence[Value], size: int) -> None:
        """``size`` bytes of each thread under ``mask``; a word that is absent or None is not known."""
        where = self._place(address[mask])
        for byte in range(size):
            value = words[byte // 4] if byte // 4 < len(words) else None
            self._known[where + byte] = value is not None
            if value is not None:
                bits = np.broadcast_to(u64(value), len(mask))[mask] >> np.uint64(8 * (byte % 4))
                self._bytes[where + byte] = (bits & np.uint64(0xFF)).astype(np.uint8)

    def load(self, address: Any, mask: np.ndarray, size: int) -> Sequence[Value]:
        """Words of each thread; None: a byte of a thread under ``mask`` is not known."""
        where = self._place(address)
        words: list[Value] = []
        for part in range(0, max(size, 4), 4):
            places = [where + part + k for k in range(min(4, size))]
            if all(self._known[each[mask]].all() for each in places):
                parts = [u64(self._bytes[each]) << np.uint64(8 * k) for k, each in enumerate(places)]
                words.append(sum(parts[1:], parts[0]))
            else:
                words.append(None)
        return words

    def combine(self, kind: str, address: Any, mask: np.ndarray, operand: Value) -> None:
        """An atomic operation on 32-bit words, thread after thread. One that is not in `COMBINE` makes them unknown."""
        function = COMBINE.get(kind)
        where = self._place(address)
        for thread in np.flatnonzero(mask):
            words = slice(where[thread], where[thread] + 4)
            if function is None or operand is None or not self._known[words].all():
                self._known[words] = False
                continue
            before = int(self._bytes[words].view(np.uint32)[0])
            after = function(before, int(np.broadcast_to(operand, len(mask))[thread]))
            self._bytes[words] = np.array([after], np.uint32).view(np.uint8)
