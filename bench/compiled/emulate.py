"""How often a program of a compiled kernel executes each instruction, and what its memory instructions touch.

The branches and addresses of a block's threads are computed from the launch's arguments: only the instructions that
they depend on are evaluated (`integers`), all others are counted. Values read from memory are unknown unless they are
those of an integer tensor of the launch. A branch that depends on an unknown value is refused, not guessed; a guarded
memory access with an unknown guard counts as executed, one with an unknown address as coalesced.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import warps
from .integers import EVALUATE, Value, u64
from .operands import TO_SHARED, is_wide, registers, split, written
from .operands import needed as needed_for_path
from .registers import Registers
from .sass import WARP, Graph, Instruction, Loop, described_shape
from .shared_memory import SYSTEM_BYTES, SharedMemory
from .traffic import SECTOR, Region, Traffic, bank_cycles, fresh_sectors

MOST_BLOCKS = 1_000_000  # executed basic blocks, after which a loop counts as endless


class Unknown(RuntimeError):
    """The path through a kernel depends on something that is not known without running it."""


@dataclasses.dataclass
class Counts:
    """One program.

    Attributes:
        executed: warps by instruction, in the order of the code. entries: warps that entered each basic block.
        sectors: (tensor, whether written) → sectors.
        from_outside: loop header → warps that entered it from outside.
        products: (instruction, (M, N, K)) → executions of a matrix instruction with its shape in a register.
    """

    code: Sequence[Instruction]
    graph: Graph
    executed: list[int]
    entries: list[int]
    traffic: dict[int, Traffic]
    sectors: dict[tuple[str, bool], int]
    from_outside: collections.Counter[int]
    products: collections.Counter[tuple[int, tuple[int, int, int]]]

    def total(self, read: Callable[[Instruction], float]) -> float:
        """The sum of a property of the instructions over their executions."""
        return sum(n * read(x) for n, x in zip(self.executed, self.code, strict=True) if n)

    @property
    def flops(self) -> float:
        """Of matrix instructions."""
        described = sum(2 * n * math.prod(shape) for (_, shape), n in self.products.items())
        return described + self.total(lambda x: x.matrix_flops)

    def trips(self, loop: Loop) -> float:
        """Mean number of trips of a loop each time that a warp enters it; 0 where none does."""
        entered = self.from_outside[loop.header]
        return self.entries[loop.header] / entered if entered else 0.0


class Emulator:
    """Executes the control flow of one kernel's programs.

    Args:
        constants: the banks by number. 0: launch dimensions and arguments at their offsets; the others: literals.
        threads: of a block.
        regions: the launch's tensors, at the addresses that the arguments hold.
    """

    def __init__(
        self, code: Sequence[Instruction], constants: Mapping[int, bytes], threads: int, regions: Sequence[Region] = ()
    ) -> None:
        self.code, self.graph = code, Graph(code)
        self._constants, self._threads = constants, threads
        self._regions = sorted(regions, key=lambda region: region.start)
        self._starts = np.array([region.start for region in self._regions], dtype=np.uint64)
        self._needed = needed_for_path(code)
        self._lanes = np.arange(threads)
        self._block_of = {block.first: b for b, block in enumerate(self.graph.blocks)}
        self._returns = any(x.words[0] == "RET" for x in code)
        self._has_tensor_memory = any(x.words[0] == "UTCATOMSWS" for x in code)
        self._entry_of = {code[block.first].address: b for b, block in enumerate(self.graph.blocks)}

    def run(self, program: tuple[int, int, int]) -> Counts:
        """The counts of the program with this index in the grid.

        Raises:
            Unknown: a branch depends on an unknown value, or a loop does not end.
        """
        self.registers = Registers(self._constants, self._threads)
        self._program = program
        self._steps = 0
        self._shared = SharedMemory(zeros=SYSTEM_BYTES if self._has_tensor_memory else 0)
        executed, entries = [0] * len(self.code), [0] * len(self.graph.blocks)
        self._counts = Counts(self.code, self.graph, executed, entries, {}, *(collections.Counter() for _ in range(3)))
        self._loop_of = {loop.header: loop for loop in self.graph.loops}
        self._run(0, np.ones(self._threads, bool), None, None)
        for b, block in enumerate(self.graph.blocks):
            for i in range(block.first, block.end):
                self._counts.executed[i] = self._counts.entries[b]
        return self._counts

    def _run(self, b: int | None, active: np.ndarray, stop: int | None, came_from: int | None) -> None:
        """Blocks from b until ``stop``, by the active threads."""
        while b is not None and b != stop and active.any():
            self._steps += 1
            if self._steps > MOST_BLOCKS:
                raise Unknown(f"no end after {MOST_BLOCKS:,} basic blocks")
            block, self.registers.active = self.graph.blocks[b], active
            entering = int(active.reshape(-1, WARP).any(axis=1).sum())
            self._counts.entries[b] += entering
            if b in self._loop_of and (came_from is None or came_from not in self._loop_of[b].blocks):
                self._counts.from_outside[b] += entering
            for i in range(block.first, block.end):
                self._execute(i, active)
            last = self.code[block.end - 1]
            following = b + 1 if b + 1 < len(self.graph.blocks) else None
            if not (last.branches or last.ends_thread):
                came_from, b = b, following
                continue
            taken = active & self._condition(last)
            rest = active & ~taken
            if last.ends_thread:
                self.registers.alive = self.registers.alive & ~taken
                came_from, b, active = b, following, rest
            elif not rest.any():
                came_from, b = b, self._target(last)
            elif not taken.any():
                came_from, b = b, following
            else:  # the threads part, and meet again where all paths lead
                join = self.graph.join[b]
                self._run(self._target(last), taken, join, b)
                self._run(following, rest, join, b)
                came_from, b, active = b, join, active & self.registers.alive

    def _target(self, x: Instruction) -> int:
        # Without a return in the code a call is a jump: that is how ptxas ends some loops for sm_80.
        if x.target is None or (x.words[0] == "CALL" and self._returns):
            raise Unknown(f"{x}: calls and computed branches are not followed")
        return self._entry_of[x.target]

    def _condition(self, x: Instruction) -> np.ndarray:
        """Which threads take a branch."""
        if "DIV" in x.words:  # taken where the warp has diverged
            return np.zeros(self._threads, bool)
        parts = [x.guard] if x.guard else []
        parts += [operand for operand in x.operands if re.fullmatch(r"!?U?P\w", operand)]
        taken = np.ones(self._threads, bool)
        for part in parts:
            value = self.registers.value(part)
            if value is None:
                raise Unknown(f"{x}: the branch depends on data")
            taken = taken & value
        return taken

    def _execute(self, i: int, active: np.ndarray) -> None:
        x = self.code[i]
        if x.access_bytes and x.pipe in ("global", "shared"):
            self._account(i, x, active)
        if x.shape_is_described:
            self._multiply(i, x, active)
        if not self._needed[i]:
            return
        guard = self.registers.value(x.guard) if x.guard else np.bool_(True)
        if x.words[0] in TO_SHARED:
            self._to_shared(x, None if guard is None else active & guard)
        names = written(x)
        if not names:
            return
        values = self._results(x, active)
        mask = None if guard is None else active & guard
        for name, value in zip(names, values, strict=False):
            self.registers.store(name, value, mask)
        for name in names[len(values) :]:
            self.registers.store(name, None, mask)

    def _results(self, x: Instruction, active: np.ndarray) -> Sequence[Value]:
        """The values of the destinations, in the order of `_written`."""
        name = x.words[0]
        destinations, sources = split(x)
        if name in ("S2R", "S2UR", "CS2R"):
            found = self._special(sources[0])
            return (found, np.uint64(0)) if sources[0] == "SRZ" else (found,)
        if name in ("LDC", "ULDC", "LDCU"):
            bits = next((int(word) for word in x.words if word in ("64", "128")), 32)
            return self.registers.constants_at(sources[0], bits // 32)
        if name == "LDG":
            return self._load(x, active)
        if name == "LDS":
            return self._from_shared(x, active)
        if name in ("REDUX", "CREDUX"):
            kind = x.words[1] if len(x.words) > 1 else "AND"
            return (warps.reduce(kind, self.registers.value(sources[0]), active, "S32" in x.words),)
        if name == "SYNCS":
            return (np.bool_(True),)  # a wait has ended
        if name == "ELECT":
            return (self._lanes % WARP == 0,)
        if name == "P2R":
            return (self.registers.packed_predicates(sources),)
        if name == "R2P":
            bits = self.registers.value(sources[0])
            return [None if bits is None else u64(bits) >> np.uint64(int(d[1:])) & 1 != 0 for d in destinations]
        if name in ("VOTE", "VOTEU"):
            return self._voted(x, destinations, sources[0], active)
        if name == "UTCATOMSWS":  # columns of tensor memory: the first ones are free
            return [np.bool_(True) if "P" in d else np.uint64(0) for d in destinations if registers(d)]
        evaluate = EVALUATE.get(name) or (EVALUATE.get(name[1:]) if name[0] == "U" else None)
        if evaluate is None:
            return ()
        wide = is_wide(x)
        third = "WIDE" in x.words  # and the result
        adds = name.removeprefix("U") in ("IADD3", "VIADD", "LEA")
        if name.endswith("HFMA2"):
            values: list[Value] = [np.uint64(0)] * len(sources)
        else:
            values = [
                self.registers.value(text, wide or (j == 2 and (third or "HI" in x.words) and "IMAD" in name), adds)
                for j, text in enumerate(sources)
            ]
        if any(value is None for value in values):
            return ()
        results = list(evaluate(x, *values))
        if third or wide:
            return results  # two registers, then the carry
        first_registers = [d for d in destinations if re.search(r"R(\d|Z)", d)]
        if name.removeprefix("U") == "LOP3":
            results = results if first_registers != destinations else results[:1]
            results = results[::-1] if destinations[0] not in first_registers else results
        return [value for d, value in zip(destinations, results, strict=False) if registers(d)]

    def _special(self, name: str) -> Value:
        axes = dict(zip("XYZ", self._program, strict=True))
        if name.startswith("SR_CTAID."):
            return np.uint64(axes[name[-1]])
        return {
            "SRZ": np.uint64(0),
            "SR_TID.X": u64(self._lanes),
            "SR_TID.Y": np.uint64(0),
            "SR_TID.Z": np.uint64(0),
            "SR_LANEID": u64(self._lanes % WARP),
            "SR_CgaCtaId": np.uint64(0),
        }.get(name)

    def _to_shared(self, x: Instruction, mask: np.ndarray | None) -> None:
        """STS, ATOMS and LDGSTS: what is stored, where it is known."""
        to = self.registers.address(next(text for text in x.operands if "[" in text), False)
        size = x.access_bytes
        if to is None or mask is None or x.words[0] == "STSM":
            self._shared.forget()
        elif not mask.any():
            return
        elif x.words[0] == "ATOMS":
            self._shared.combine(x.words[1], to, mask, self.registers.value(x.operands[-1]))
        elif x.words[0] == "STS":
            found = [self.registers.value(name) for name in registers(x.operands[1], max(1, size // 4))]
            self._shared.store(to, mask, found or [np.uint64(0)], size)  # RZ
        else:
            copied = self.registers.value(x.operands[-1]) if re.fullmatch(r"!?P\w", x.operands[-1]) else np.bool_(True)
            source = self.registers.address(x.operands[1], True)
            words = () if copied is None else self._read_global(x, source, mask & copied)
            self._shared.store(to, mask, words, size)

    def _from_shared(self, x: Instruction, active: np.ndarray) -> Sequence[Value]:
        """LDS; unknown where a byte is."""
        source = self.registers.address(x.operands[-1], False)
        guard = self.registers.value(x.guard) if x.guard else np.bool_(True)
        if source is None or guard is None:
            return ()
        return self._shared.load(source, active & guard, x.access_bytes)

    def _voted(self, x: Instruction, destinations: Sequence[str], operand: str, active: np.ndarray) -> Sequence[Value]:
        value = self.registers.value(operand)
        if value is None:
            return ()
        ballot, found = warps.vote(x.words[1], value, active)
        return [found if "P" in name else ballot for name in destinations if registers(name)]

    def _multiply(self, i: int, x: Instruction, active: np.ndarray) -> None:
        """Counts a matrix instruction with its shape in a register; one warp's threads issue one product."""
        guard = self.registers.value(x.guard) if x.guard else np.bool_(True)
        descriptor = self.registers.value(registers(x.operands[-2])[0])
        if guard is None or descriptor is None:
            raise Unknown(f"{x}: the product depends on data")
        for warp in np.flatnonzero((active & guard).reshape(-1, WARP).any(axis=1)):
            shape = described_shape(int(np.broadcast_to(descriptor, self._threads)[WARP * warp]))
            self._counts.products[i, shape] += 1

    def _load(self, x: Instruction, active: np.ndarray) -> Sequence[Value]:
        """LDG."""
        address = self.registers.address(x.operands[-1] if "[" in x.operands[-1] else x.operands[-2], True)
        guard = self.registers.value(x.guard) if x.guard else np.bool_(True)
        return () if guard is None else self._read_global(x, address, active & guard)

    def _read_global(self, x: Instruction, address: Value, mask: np.ndarray) -> Sequence[Value]:
        """The values of an integer tensor, 0 for threads that do not read; unknown of any other tensor."""
        if address is None or not self._regions:
            return ()
        size = x.access_bytes
        where = address[mask]
        if not where.size:
            return ()
        index = int(np.searchsorted(self._starts, where[0], "right")) - 1
        region = self._regions[index] if index >= 0 else None
        if region is None or region.values is None:
            return ()
        offset = np.zeros(self._threads, np.int64)
        offset[mask] = (where - np.uint64(region.start)).astype(np.int64)
        if offset.min() < 0 or offset.max() + size > region.size:
            raise Unknown(f"{x}: reads outside {region.name}")
        values = []
        for part in range(0, max(size, 4), 4):
            bytes_of = [u64(region.values[offset + part + k]) << np.uint64(8 * k) for k in range(min(4, size))]
            values.append(np.where(mask, sum(bytes_of[1:], bytes_of[0]), np.uint64(0)))
        return values

    def _account(self, i: int, x: Instruction, active: np.ndarray) -> None:
        """Adds an execution of a memory instruction to its traffic."""
        guard = self.registers.value(x.guard) if x.guard else np.bool_(True)
        mask = active if guard is None else active & guard
        if x.words[0] == "LDGSTS" and re.fullmatch(r"!?P\w", x.operands[-1]):
            copied = self.registers.value(x.operands[-1])  # false: zeros are stored, nothing is read
            mask = mask if copied is None else mask & copied
            certain = guard is not None and copied is not None
        else:
            certain = guard is not None
        if not mask.any():
            return
        in_global = x.pipe == "global"
        operand = [text for text in x.operands if "[" in text][-1 if x.words[0] == "LDGSTS" else 0]
        address = self.registers.address(operand, in_global)
        traffic = self._counts.traffic.setdefault(i, Traffic())
        by_warp = mask.reshape(-1, WARP)
        lanes = int(mask.sum())
        requests = int(by_warp.any(axis=1).sum())
        size = x.access_bytes
        traffic.requests += requests
        traffic.thread_bytes += lanes * size
        if address is None:
            traffic.assumed += requests
            units = -(-lanes * size // SECTOR) if in_global else requests * max(1, size // 4)
        elif in_global:
            units = self._sectors(x, address, mask, size, certain)
        else:
            units = bank_cycles(address.reshape(-1, WARP), by_warp, x)
        traffic.units += units
        if address is None and in_global:
            self._counts.sectors[("?", x.words[0].startswith(("ST", "RED")))] += units

    def _sectors(self, x: Instruction, address: Any, mask: np.ndarray, size: int, certain: bool) -> int:
        """Distinct sectors of each warp's request, also added to the tensor's. certain: it is known to be executed."""
        units = fresh_sectors(address, mask)
        if self._regions:
            where = int(address[mask][0])
            index = int(np.searchsorted(self._starts, np.uint64(where), "right")) - 1
            region = self._regions[index] if index >= 0 else None
            most = int(address[mask].max()) + size
            if region is None or most > region.start + region.size or int(address[mask].min()) < region.start:
                if certain:
                    raise Unknown(f"{x}: accesses outside the launch's tensors")
                return 0
            self._counts.sectors[(region.name, x.words[0].startswith(("ST", "RED", "ATOM")))] += units
        return units


def loop_trips(counts: Counts) -> Mapping[int, float]:
    """Address of each loop's first instruction → trips."""
    return {counts.code[counts.graph.blocks[x.header].first].address: counts.trips(x) for x in counts.graph.loops}
