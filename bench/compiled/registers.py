"""The registers of a block's threads, as far as they are known, and what the operands of an instruction name.

A register holds an array with an element a thread, or one value for all (`integers`). It can be known for some threads
and not for others: a warp overwrites what was loaded, and branches on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .integers import MASK, U32, Value, low, signed, u64
from .operands import REGISTER, TERM, registers

_NUMBER = re.compile(r"^-?(0x[0-9a-f]+|\d+)$")
_CONSTANT = re.compile(r"^(?P<sign>[-~]?)c\[(?P<bank>0x[0-9a-f]+)\]\[(?P<offset>0x[0-9a-f]+)\]$")
_ADDRESS = re.compile(r"\[(?P<terms>[^\[\]]*)\]$")


class Registers:
    """Registers and predicates, all 0 at first.

    Args:
        constants: the banks by number.
        threads: of the block.

    Attributes:
        alive: threads that have not ended. active: those that execute the current block.
    """

    def __init__(self, constants: Mapping[int, bytes], threads: int) -> None:
        self._constants, self._threads = constants, threads
        self._values: dict[str, Value] = {}
        self._unknown: dict[str, np.ndarray] = {}  # register → the threads for which its value is not known
        self.alive = self.active = np.ones(threads, bool)

    def value(self, operand: str, wide: bool = False, borrow: bool = False) -> Value:
        """The value of a source operand; None: unknown. borrow: a negated operand is 2³² − b also where b is 0."""
        register = REGISTER.match(operand)
        sign = ""
        if register:
            name, sign = register["name"], register["sign"]
            if name in ("PT", "UPT"):
                return np.bool_(sign != "!")
            if name in ("RZ", "URZ"):
                value: Value = np.uint64(0)
            elif wide and "R" in name:
                lower, upper = (self._register(part) for part in registers(name, 2))
                value = None if lower is None or upper is None else u64(lower) | (u64(upper) << U32)
            else:
                value = self._register(name)
            if value is not None and register["abs"]:
                value = low(np.abs(signed(value)))
        elif _NUMBER.match(operand):
            value = np.uint64(int(operand, 0) & (0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF))
        else:
            constant = _CONSTANT.match(operand)
            if constant is None:
                return None
            offset, sign = int(constant["offset"], 16), constant["sign"]
            size = 8 if wide else 4
            bank = self._constants.get(int(constant["bank"], 16), b"")
            if offset + size > len(bank):
                return None
            value = np.uint64(int.from_bytes(bank[offset : offset + size], "little"))
        if value is None or not sign:
            return value
        if sign == "!":
            return ~np.asarray(value).astype(bool)
        if wide:
            return ~u64(value) if sign == "~" else u64(-u64(value).astype(np.int64))
        if sign == "~":
            return u64(value) ^ MASK
        negated = np.uint64(1 << 32) - low(value)
        return negated if borrow else low(negated)

    def store(self, name: str, value: Value, mask: np.ndarray | None) -> None:
        """``value`` for the threads under ``mask``. None: not known, which value it is or which threads those are."""
        if mask is not None and not mask.any():
            return
        if mask is None or not (self.alive & ~mask).any():
            self._values[name] = None if mask is None else value
            self._unknown.pop(name, None)
            return
        zero = np.bool_(False) if "P" in name else np.uint64(0)
        old = self._values.get(name, zero)
        unknown = self._unknown.get(name, np.zeros(self._threads, bool)) if old is not None else ~mask
        unknown = unknown & ~mask if value is not None else unknown | mask
        self._unknown.pop(name, None)
        if unknown.any():
            self._unknown[name] = unknown
        self._values[name] = np.where(mask, zero if value is None else value, zero if old is None else old)

    def constants_at(self, operand: str, words: int) -> Sequence[Value]:
        """Consecutive words of a constant bank."""
        first = _CONSTANT.match(operand)
        if first is None:
            return ()
        places = (int(first["offset"], 16) + 4 * i for i in range(words))
        return [self.value(f"c[{first['bank']}][{place:#x}]") for place in places]

    def packed_predicates(self, sources: Sequence[str]) -> Value:
        """P2R: the predicates' bits under a mask, over a register's other bits."""
        base, mask = self.value(sources[1]), int(sources[2], 16)
        if base is None:
            return None
        result = u64(base) & np.uint64(0xFFFFFFFF ^ mask)
        for p in range(7):
            if mask >> p & 1:
                value = self.value(f"P{p}")
                if value is None:
                    return None
                result = result | (u64(value) << np.uint64(p))
        return result

    def address(self, operand: str, global_memory: bool) -> Value:
        """The threads' addresses in an operand with brackets; None: unknown."""
        found = _ADDRESS.search(operand)
        if found is None:
            return None
        total: Any = np.zeros(self._threads, np.uint64)
        for term in TERM.finditer(found["terms"]):
            if term["offset"]:
                total = total + np.uint64(int(term["offset"], 16) & 0xFFFFFFFFFFFFFFFF)
                continue
            wide = bool(term["wide"]) or (global_memory and term["name"].startswith("UR"))
            value = self.value(term["name"], wide)
            if value is None:
                return None
            total = total + u64(value) * np.uint64(int(term["scale"][1:]) if term["scale"] else 1)
        return total if global_memory else low(total)

    def _register(self, name: str) -> Value:
        """A register's value, if it is known for all active threads."""
        unknown = self._unknown.get(name)
        if unknown is not None and (unknown & self.active).any():
            return None
        return self._values.get(name, np.bool_(False) if "P" in name else np.uint64(0))
