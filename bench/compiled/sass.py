"""SASS, the machine code of NVIDIA GPUs, as ``nvdisasm -c`` prints it: instructions, control-flow graph, natural loops.

What each instruction costs is counted for a warp: issue slots of a scheduler, the pipe that executes it, FLOPs of
matrix instructions, bytes of memory instructions. The pipes are those of Nsight Compute's documentation ("Pipelines").
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

WARP = 32
INSTRUCTION_BYTES = 16

_LABEL = re.compile(r"^(\.L\w+):")
_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][A-Za-z0-9_.]*)\s*(?P<rest>.*?)\s*;"
)
_SECTION = re.compile(r"^\s*\.section\s+(?:\.nv\.constant(?P<bank>\d+)\.)?")
_DATA = re.compile(r"\.(?P<unit>byte|short|word|dword)\s+(?P<numbers>0x.*)$")
_TARGET = re.compile(r"`\((\.\w+)\)")
_MATRIX_SHAPE = re.compile(r"^(?P<kind>[A-Z]*GMMA)\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)|^[HI]MMA\.(?P<packed>\d+)")
PACKED_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}  # M, N, K of HMMA's mnemonics

PIPES = {
    "xu": ("MUFU", "I2F", "F2I", "F2F", "I2I", "FRND", "POPC", "FLO", "BREV"),
    "fma": ("FFMA", "FMUL", "FADD", "FFMA32I", "FADD32I", "FMUL32I", "FSWZADD", "FHADD", "FHFMA"),
    "fma2": ("FFMA2", "FMUL2", "FADD2"),  # two in one, since sm_100
    "imad": ("IMAD",),
    "half": ("HFMA2", "HADD2", "HMUL2", "HSET2", "HSETP2", "HMNMX2"),
    "fp64": ("DFMA", "DADD", "DMUL", "DSETP"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS", "SHFL", "REDUX", "CREDUX"),
    "global": ("LDG", "STG", "LDGSTS", "ATOMG", "ATOM", "RED", "LD", "ST", "UBLKCP", "UTMALDG", "UTMASTG", "UBLKRED"),
    "spill": ("LDL", "STL"),
    "barrier": (
        *("BAR", "MEMBAR", "FENCE", "SYNCS", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "ARRIVES", "ERRBAR"),
        *("CCTL", "UTMACMDFLUSH", "UTMACCTL", "UTCBAR"),
    ),
    "branch": ("BRA", "BRX", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "JMP", "NANOSLEEP", "BPT", "YIELD"),
    "constant": ("LDC", "ULDC", "LDCU", "S2R", "S2UR", "CS2R", "NOP"),
}
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from the kernel's start.
        guard: the predicate that it is executed under, e.g. "P0" or "!UP1".
        operands: as printed.
        target: the address that a branch goes to.
    """

    address: int
    guard: str | None
    opcode: str
    operands: tuple[str, ...]
    target: int | None = None

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x}: {guard}{self.opcode} {', '.join(self.operands)}".rstrip()

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The opcode's words: ("LDG", "E", "128")."""
        return tuple(self.opcode.split("."))

    @functools.cached_property
    def pipe(self) -> str:
        """A key of `PIPES`, "tensor", "uniform" or "alu" (the rest: integers, logic, comparisons, conversions)."""
        name = self.words[0]
        if name.endswith("MMA") and self.opcode[:9] != "HFMA2.MMA":
            return "tensor"
        found = _PIPE_OF.get(name)
        if found:
            return found
        return "uniform" if name.startswith("U") or name in ("R2UR", "VOTEU") else "alu"

    @functools.cached_property
    def access_bytes(self) -> int:
        """Bytes that a thread of a memory instruction reads or writes; 0 for other instructions."""
        if self.pipe not in ("shared", "global", "spill") or self.words[0] in ("SHFL", "REDUX", "CREDUX"):
            return 0
        if self.words[0] in ("LDSM", "STSM"):  # matrices of 8 × 8 elements of 16 bits, 4 bytes a thread each
            return 4 * next((int(word) for word in self.words[2:] if word in ("2", "4")), 1)
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[word] for word in self.words if word in sizes), 4)

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, int, int] | None:
        """(M, N, K) of a matrix instruction; None of other instructions, and where the mnemonic does not say it."""
        found = _MATRIX_SHAPE.match(self.opcode) if self.pipe == "tensor" else None
        if found is None:
            return None
        if found["packed"]:
            return PACKED_SHAPES.get(found["packed"])
        return int(found["m"]), int(found["n"]), int(found["k"])

    @property
    def shape_is_described(self) -> bool:
        """The shape is in a register (see `described_shape`): 16-bit and tf32 products in tensor memory (sm_100)."""
        return self.words[0] == "UTCHMMA"

    @functools.cached_property
    def matrix_flops(self) -> float:
        """FLOPs of a warp. Four warps share one warp-group instruction (HGMMA). 0 where `shape_is_described`.

        Raises:
            ValueError: the shape of a matrix instruction is not known.
        """
        if self.pipe != "tensor" or self.shape_is_described:
            return 0
        if self.matrix_shape is None:
            raise ValueError(f"{self}: a matrix instruction of unknown shape")
        m, n, k = self.matrix_shape
        return 2 * m * n * k / (4 if self.words[0].endswith("GMMA") else 1)

    @property
    def ends_thread(self) -> bool:
        return self.words[0] in ("EXIT", "RET", "BPT")

    @property
    def branches(self) -> bool:
        return self.words[0] in ("BRA", "JMP", "BRX", "CALL")


def described_shape(descriptor: int) -> tuple[int, int, int]:
    """(M, N, K) in the instruction descriptor of UTCHMMA (PTX ISA, tcgen05, "Instruction descriptor").

    Raises:
        ValueError: it is of a sparse product.
    """
    if descriptor >> 2 & 1:
        raise ValueError(f"descriptor {descriptor:#x}: a sparse product")
    tf32 = descriptor >> 7 & 7 == 2
    return (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3, 8 if tf32 else 16


def parse(text: str) -> list[Instruction]:
    """The instructions of the one kernel in nvdisasm's text.

    Raises:
        ValueError: it holds none, several kernels, or a branch to an unknown label.
    """
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels of the next instruction
    found: list[tuple[Instruction, str | None]] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            waiting.append(label[1])
            continue
        read = _LINE.match(line)
        if read is None:
            continue
        address = int(read["address"], 16)
        if found and address <= found[-1][0].address:
            raise ValueError("several kernels in one text")
        labels |= dict.fromkeys(waiting, address)
        waiting = []
        target = _TARGET.search(read["rest"])
        operands = tuple(part.strip() for part in read["rest"].split(",")) if read["rest"] else ()
        found.append((Instruction(address, read["guard"], read["opcode"], operands), target and target[1]))
    if not found:
        raise ValueError("no SASS in the text")
    missing = {name for _, name in found if name and name not in labels}
    if missing:
        raise ValueError(f"branches to unknown labels: {', '.join(sorted(missing))}")
    return [dataclasses.replace(x, target=labels[name]) if name else x for x, name in found]


def literals(text: str) -> dict[int, bytes]:
    """The constant banks that the compiler fills, by number, in nvdisasm's text."""
    banks: dict[int, bytearray] = {}
    bank = 0
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section:
            bank = int(section["bank"] or 0)
        elif bank and (data := _DATA.search(line)):
            numbers = [int(part, 0) for part in data["numbers"].split(",")]
            size = {"byte": 1, "short": 2, "word": 4, "dword": 8}[data["unit"]]
            banks.setdefault(bank, bytearray()).extend(b"".join(n.to_bytes(size, "little") for n in numbers))
    return {number: bytes(found) for number, found in banks.items()}


@dataclasses.dataclass(frozen=True)
class Block:
    """A basic block: instructions first … end − 1 of the list; the blocks that may follow."""

    first: int
    end: int
    successors: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop: its header and all its blocks, the header too; inner loops' blocks are among them."""

    header: int
    blocks: frozenset[int]


class Graph:
    """The control-flow graph of a kernel.

    Attributes:
        blocks: in the order of their addresses; the first is the entry.
        join: block → its immediate post-dominator, where threads that diverged meet again; None: they end apart.
        loops: outer loops before inner ones.
    """

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        index = {x.address: i for i, x in enumerate(code)}
        starts = {0}
        for i, x in enumerate(code):
            if x.target is not None:
                starts.add(index[x.target])
            if (x.branches or x.ends_thread) and i + 1 < len(code):
                starts.add(i + 1)
        first = sorted(starts)
        number = {start: b for b, start in enumerate(first)}
        self.blocks: list[Block] = []
        for b, (start, end) in enumerate(zip(first, [*first[1:], len(code)], strict=True)):
            last = code[end - 1]
            goes_on = not (last.branches or last.ends_thread) or last.guard is not None or len(last.operands) > 1
            goes_on |= last.words[0] == "CALL" and last.target is None  # a function of ptxas, which returns
            follow = [number[index[last.target]]] if last.target is not None else []
            if goes_on and b + 1 < len(first):
                follow.append(b + 1)
            self.blocks.append(Block(start, end, tuple(dict.fromkeys(follow))))
        self.join = self._joins()
        self.loops = sorted(self._loops(), key=lambda loop: -len(loop.blocks))

    def _joins(self) -> list[int | None]:
        """Immediate post-dominators, by sets: kernels have some dozens of blocks."""
        n = len(self.blocks)
        after = [set(range(n + 1)) for _ in range(n)] + [{n}]  # n: the end of all threads
        follow = [self._follow(b) for b in range(n)]
        changed = True
        while changed:
            changed = False
            for b in reversed(range(n)):
                new = {b} | set.intersection(*(after[s] for s in follow[b]))
                changed |= new != after[b]
                after[b] = new
        nearest: list[int | None] = []
        for b in range(n):
            others = after[b] - {b}
            # The nearest is post-dominated by all the others.
            best = max(others, key=lambda s: len(after[s]), default=n)
            nearest.append(None if best == n else best)
        return nearest

    def _follow(self, b: int) -> list[int]:
        block = self.blocks[b]
        last = self.code[block.end - 1]
        may_end = last.ends_thread or not block.successors
        return [*block.successors, *([len(self.blocks)] if may_end else [])]

    def _loops(self) -> Iterator[Loop]:
        n = len(self.blocks)
        before = [{0}, *(set(range(n)) for _ in range(1, n))]  # dominators
        into: list[list[int]] = [[] for _ in range(n)]
        for b, block in enumerate(self.blocks):
            for s in block.successors:
                into[s].append(b)
        changed = True
        while changed:
            changed = False
            for b in range(1, n):
                reached = [before[p] for p in into[b]]
                new = {b} | (set.intersection(*reached) if reached else set())
                changed |= new != before[b]
                before[b] = new
        bodies: dict[int, set[int]] = {}
        for b, block in enumerate(self.blocks):
            for header in block.successors:
                if header not in before[b]:
                    continue
                body = bodies.setdefault(header, {header})
                stack = [b]
                while stack:
                    inner = stack.pop()
                    if inner not in body:
                        body.add(inner)
                        stack += into[inner]
        for header, body in bodies.items():
            if len(body) > 1 or self.code[self.blocks[header].first].words[0] != "BRA":  # not the trap after the end
                yield Loop(header, frozenset(body))
