"""The operands of SASS: which registers an instruction reads and writes, and which instructions decide the path."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .sass import WARP, Instruction

REGISTER = re.compile(r"^(?P<sign>[-~!]?)(?P<abs>\|?)(?P<name>U?[RP](?:\d+|Z|T))(?:\.\w+)*\|?$")
TERM = re.compile(r"(?P<name>U?R(?:\d+|Z))(?:\.(?P<scale>X\d+))?(?P<wide>\.64)?|(?P<offset>-?0x[0-9a-f]+)")
TO_SHARED = ("STS", "STSM", "LDGSTS", "ATOMS")  # instructions that write shared memory
NEVER = ("RZ", "URZ", "PT", "UPT", "SRZ")


def split(x: Instruction) -> tuple[list[str], list[str]]:
    """(destinations, sources): names of the operands as printed, in order. Memory and branches have no destinations
    but loads'."""
    name, operands = x.words[0], list(x.operands)
    if name == "SYNCS" and "[" not in operands[0]:
        return operands[:1], operands[1:]
    if name in ("VOTE", "VOTEU"):  # [ballot,] predicate, what is voted on
        return operands[:-1], operands[-1:]
    if x.pipe in ("branch", "barrier") or name in ("STG", "STS", "STL", "STSM", "LDGSTS", "RED", "NOP"):
        return [], operands
    if name == "R2P":
        return [f"P{i}" for i in range(7) if int(operands[2], 16) >> i & 1], operands[1:]
    if name.endswith(("SETP", "PLOP3")):
        return operands[:2], operands[2:]
    end = 0
    while end < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[end]):
        end += 1
    if end < len(operands):
        end += 1  # the register
        if name.removeprefix("U") in ("IADD3", "LEA", "IMAD", "VIMNMX"):
            while end < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[end]):
                end += 1
    if any("[" in text for text in operands[:end]):  # tensor memory or a descriptor, which is only read
        return [], operands
    return operands[:end], operands[end:]


def is_wide(x: Instruction) -> bool:
    """Whether the operands of an integer instruction are pairs of registers."""
    name = x.words[0].removeprefix("U")
    if name in ("ISETP", "IMNMX"):
        return "U64" in x.words or "S64" in x.words
    return "64" in x.words and name in ("IADD3", "IADD", "MOV", "SEL")


def _width(x: Instruction) -> int:
    """32-bit registers that the destination has."""
    name = x.words[0].removeprefix("U")
    if x.pipe == "tensor":
        m, n, _ = x.matrix_shape or (64, 256, 0)
        return max(2, m * n // (4 * WARP if name.endswith("GMMA") else WARP))
    if name in ("LDG", "LDS", "LDSM", "LDL", "LD"):
        return max(1, x.access_bytes // 4)
    if name == "LDTM":  # tensor memory: x64 columns
        return next(int(word[1:]) for word in x.words if re.fullmatch(r"x\d+", word))
    if name in ("FADD2", "FMUL2", "FFMA2"):
        return 2
    if name == "CS2R":
        return 1 if "32" in x.words else 2
    if "WIDE" in x.words or is_wide(x) or (name in ("LDC", "LDCU") and "64" in x.words) or name.startswith("D"):
        return 2
    return 4 if "128" in x.words else 1


def registers(operand: str, width: int = 1) -> list[str]:
    """The registers and predicates that an operand names."""
    if "[" in operand:
        found = []
        for term in TERM.finditer(operand.split("[", 1)[1]):
            if term["name"]:
                found += registers(term["name"], 2 if term["wide"] or term["name"].startswith("UR") else 1)
        return found
    read = REGISTER.match(operand)
    if read is None or read["name"] in NEVER:
        return []
    stem, number = re.fullmatch(r"(\D+)(\d+)", read["name"]).groups()  # type: ignore[union-attr]
    return [f"{stem}{int(number) + i}" for i in range(width)] if stem.endswith("R") else [read["name"]]


def written(x: Instruction) -> list[str]:
    names, width = [], _width(x)
    for operand in split(x)[0]:
        names += registers(operand, width)
    return names


def _read(x: Instruction) -> list[str]:
    wide = 2 if "WIDE" in x.words or "64" in x.words or "HI" in x.words or is_wide(x) else 1
    names = [name for operand in split(x)[1] for name in registers(operand, wide)]
    if x.words[0] == "P2R":
        names += [f"P{i}" for i in range(7)]
    guard = registers(x.guard) if x.guard else []
    return names + guard + (written(x) if guard else [])


def needed(code: Sequence[Instruction]) -> list[bool]:
    """Which instructions the branches and the addresses of memory depend on, whatever the path."""
    names: set[str] = set()
    for x in code:
        if x.branches or x.ends_thread or (x.access_bytes and x.pipe != "spill"):
            names.update(registers(x.guard) if x.guard else [])
            for operand in x.operands:
                if "[" in operand or operand.lstrip("!").startswith(("P", "UP")):
                    names.update(registers(operand))
        elif x.shape_is_described:
            names.update(registers(x.operands[-2]) + (registers(x.guard) if x.guard else []))
    writes = [written(x) for x in code]
    while True:
        wanted = [not names.isdisjoint(w) for w in writes]
        if any(x.words[0] == "LDS" and want for x, want in zip(code, wanted, strict=True)):  # what was stored decides
            wanted = [want or x.words[0] in TO_SHARED for x, want in zip(code, wanted, strict=True)]
        more = {name for x, want in zip(code, wanted, strict=True) if want for name in _read(x)} - names
        if not more:
            return wanted
        names |= more
