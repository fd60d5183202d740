"""From a launch that did not happen to the counts of its programs: arguments as the GPU's constant bank holds them."""

from __future__ import annotations

import dataclasses
import functools
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .aot import Launch
from .emulate import Counts, Emulator
from .sass import WARP, Instruction, literals, parse
from .traffic import SECTOR, Region

# Architecture → (offset of the arguments, offset of the block's and grid's dimensions) in constant bank 0.
BANKS = {80: (0x160, 0x0), 90: (0x210, 0x0), 100: (0x380, 0x360), 120: (0x380, 0x360)}
DIMENSIONS = {80: 0xC, 90: 0xC, 100: 0x10, 120: 0x10}  # from the block's dimensions to the grid's
FORMATS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q", "fp32": "<f"}
# Integer tensors that the caller fills: the path through a kernel may depend on them.
KNOWN = ("cu_seqlens", "_ids", "labels", "key_mask", "seed", "keys", "order", "slots")
WHOLE_GRID = 8  # programs of a grid that are all run
_parse = functools.lru_cache(maxsize=256)(parse)


def _flatten(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(signature, tuple):
        for kind, part in zip(signature, value, strict=True):
            yield from _flatten(kind, part)
    elif signature != "constexpr":
        yield signature, value


def constant_bank(launch: Launch) -> bytes:
    """Bank 0 of the constants that the kernel's instructions read.

    Raises:
        ValueError: an argument is of a kind that has no entry in `FORMATS` (a tensor descriptor).
    """
    arguments_at, dimensions_at = BANKS[launch.resources.arch]
    bank = bytearray(arguments_at)
    grid = (*launch.grid, 1, 1)[:3]
    struct.pack_into("<3I", bank, dimensions_at, launch.resources.num_warps * WARP, 1, 1)
    struct.pack_into("<3I", bank, dimensions_at + DIMENSIONS[launch.resources.arch], *grid)
    for name, signature in launch.signature.items():
        for kind, value in _flatten(signature, launch.arguments.get(name)):
            if kind.startswith("*"):
                packed = struct.pack("<Q", value.data_ptr())
            elif kind in FORMATS:
                packed = struct.pack(FORMATS[kind], _wrapped(kind, value))
            else:
                raise ValueError(f"{launch.resources.name}: argument {name} is of kind {kind}")
            bank += bytes(-len(bank) % len(packed)) + packed
    return bytes(bank) + bytes(32)  # Triton's scratch pointers: null


def _wrapped(kind: str, value: Any) -> Any:
    """An integer as its type holds it: p_threshold is an unsigned number in an i32."""
    if kind == "fp32":
        return value
    bits = int(kind[1:])
    value = int(value) & ((1 << bits) - 1)
    return value - (1 << bits) if kind[0] == "i" and value >> (bits - 1) else value


def regions(launch: Launch) -> list[Region]:
    """The launch's tensors by storage; views of one storage are one region, named after the first argument."""
    found: dict[int, Region] = {}
    for name, value in launch.arguments.items():
        if not isinstance(value, torch.Tensor) or not value.untyped_storage().nbytes():
            continue
        storage = value.untyped_storage()
        values = None
        if any(word in name for word in KNOWN) and not value.is_floating_point():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            values = np.pad(whole.numpy(), (0, 8))
        found.setdefault(
            storage.data_ptr(), Region(name.removesuffix("_ptr"), storage.data_ptr(), storage.nbytes(), values)
        )
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Work:
    """The mean program of a launch, from a sample.

    Attributes:
        programs: of the grid. sampled: of them.
        read_bytes, written_bytes: of global memory by the whole launch, each byte of a tensor at most once.
        sizes: bytes of the launch's tensors.
    """

    code: Sequence[Instruction]
    programs: int
    sampled: tuple[Counts, ...]
    read_bytes: float
    written_bytes: float
    sizes: dict[str, int]

    def mean(self, read: Any) -> float:
        """The mean over the sample of ``read(counts)``."""
        return float(np.mean([read(counts) for counts in self.sampled]))


def work(launch: Launch, sample: int) -> Work:
    """Runs ``sample`` programs of the grid, one drawn from each of as many equal parts of it; of a small grid, all.

    Raises:
        emulate.Unknown: a path depends on something that is not known.
    """
    code = _parse(launch.sass)
    there = regions(launch)
    constants = {0: constant_bank(launch), **literals(launch.sass)}
    emulator = Emulator(code, constants, launch.resources.num_warps * WARP, there)
    x, y, z = (*launch.grid, 1, 1)[:3]
    programs = x * y * z
    chance = random.Random(0)
    n = programs if programs <= WHOLE_GRID else min(sample, programs)
    chosen = [int((i + chance.random()) * programs / n) for i in range(n)]
    counts = tuple(emulator.run((p % x, p // x % y, p // (x * y))) for p in chosen)
    sizes = {region.name: region.size for region in there}
    moved = {False: 0.0, True: 0.0}
    for key in {key for each in counts for key in each.sectors}:
        name, written = key
        total = SECTOR * float(np.mean([each.sectors.get(key, 0) for each in counts])) * programs
        moved[written] += min(total, sizes.get(name, total))
    return Work(code, programs, counts, moved[False], moved[True], sizes)
