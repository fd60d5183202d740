"""What the compiler makes of the kernels for a GPU that is not here: registers, spills, shared memory, instructions.

Triton needs no GPU to compile. `compiled_kernels` replaces its driver, so that calling an operator on CPU tensors
compiles, for the architecture named, exactly what its launcher would launch there (same tiles, warps, alignment), and
launches nothing: outputs are uninitialised memory. The resources are read from the cubin with the tools in Triton's
wheel. `table` is the program that prints them for every operator.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from ...kernels import backend, rows, use_backend
from ...kernels.backend import interpreting, triton


class Limits(NamedTuple):
    """Of a multiprocessor (CUDA C programming guide, compute capabilities); ``shared_bytes`` is a block's."""

    registers: int
    warps: int
    shared_bytes: int


LIMITS = {
    80: Limits(65536, 64, 163 * 1024),
    90: Limits(65536, 64, 227 * 1024),
    100: Limits(65536, 64, 227 * 1024),
    120: Limits(65536, 48, 99 * 1024),
}
MAX_BLOCKS = 32
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor of sm_100 (PTX ISA, tcgen05)
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # each chip's own matrix instruction


@dataclasses.dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        registers: of a thread. spill_bytes: of a thread, in local memory.
        tensor_memory_columns: a power of two; 0 before sm_100.
        instructions: SASS opcode → how often it occurs in the code.
        constants: the constexpr arguments that it was compiled for.
    """

    name: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    instructions: dict[str, int]
    constants: dict[str, Any]

    def _blocks(self) -> dict[str, int]:
        """Resident blocks of a multiprocessor that each resource allows."""
        limits = LIMITS[self.arch]
        warp_registers = -(-self.registers * 32 // 256) * 256  # allocated by warp in units of 256
        return {
            "registers": limits.registers // (warp_registers * self.num_warps),
            "shared memory": limits.shared_bytes // max(self.shared_bytes, 1),
            "warps": limits.warps // self.num_warps,
            "tensor memory": TENSOR_MEMORY_COLUMNS // max(self.tensor_memory_columns, 1),
            "blocks": MAX_BLOCKS,
        }

    @property
    def blocks_per_multiprocessor(self) -> int:
        return min(self._blocks().values())

    @property
    def limited_by(self) -> str:
        """The resource that runs out first."""
        blocks = self._blocks()
        return min(blocks, key=lambda resource: blocks[resource])

    @property
    def matrix_instruction(self) -> str | None:
        """The newest kind of matrix instruction in the code."""
        return next((op for op in ("UTCHMMA", "HGMMA", "HMMA") if self.count(op)), None)

    def count(self, prefix: str) -> int:
        """Instructions with an opcode that starts with ``prefix``, e.g. "HGMMA" or "LDG"."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))

    def count_wide(self, prefix: str) -> int:
        """Those of 128 bits: "LDG" for loads to registers (LDG) and to shared memory (LDGSTS), "STG" for stores."""
        return sum(
            n for opcode, n in self.instructions.items() if opcode.startswith(prefix) and "128" in opcode.split(".")
        )


class _DriverWithoutGPU:
    """The part of Triton's driver interface that the compiler uses."""

    def __init__(self, arch: int) -> None:
        self._target = triton.backends.compiler.GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return -self._target.arch  # no GPU has this index, so that a real launch never finds what is compiled here

    def get_current_stream(self, device: int) -> int:
        return 0


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, spill bytes, SASS with the compiler's literals) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [_tool("cuobjdump"), "-res-usage", file.name], [_tool("nvdisasm"), file.name]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            usage, sass = pool.map(
                functools.partial(subprocess.run, capture_output=True, text=True, check=True), commands
            )
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage.stdout))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage.stdout))
    sections = re.split(r"^(?=\s*\.section\s)", sass.stdout, flags=re.MULTILINE)
    wanted = re.compile(r"\s*\.section\s+\.(text|nv\.constant[1-9])")
    return registers, stack, "".join(part for part in sections if wanted.match(part))


def opcode_counts(sass: str) -> collections.Counter[str]:
    """Opcode → how often it occurs in nvdisasm's text."""
    return collections.Counter(
        re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE)
    )


class Launch(NamedTuple):
    """A launch that did not happen, and its kernel.

    Attributes:
        function: the Triton function.
        arguments: by name, with warps, stages and the compiler's options. signature: their types.
    """

    resources: Resources
    sass: str
    grid: tuple[int, ...]
    function: Any
    arguments: dict[str, Any]
    signature: dict[str, Any]


@contextlib.contextmanager
def compiled_kernels(
    arch: int = 90, observe: Callable[[Launch], None] = lambda launch: None, multiprocessors: int | None = None
) -> Iterator[list[Resources]]:
    """Within the block, operators on CPU tensors compile for ``sm_<arch>`` and append their `Resources` to the list.

    Args:
        observe: called at each launch, also of a kernel that is in the list.
        multiprocessors: of the GPU, on which some grids depend; None: as few programs as under the interpreter.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, or a kernel does not compile.
    """
    if interpreting():
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter replaces the compiler for the whole process")
    found: list[Resources] = []
    seen: dict[int, tuple[Resources, str]] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen[id(kernel)] = read(self, kernel)
            found.append(seen[id(kernel)][0])
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        shape = grid(arguments) if callable(grid) else grid
        observe(Launch(*seen[id(kernel)], tuple(shape), self, arguments, kernel.src.signature))
        return kernel

    def read(self: Any, kernel: Any) -> tuple[Resources, str]:
        registers, spills, sass = _read_cubin(kernel.asm["cubin"])
        names = {(i,): name for i, name in enumerate(self.arg_names)}
        constants = {names.get(k, str(k)): v for k, v in kernel.src.constants.items() if not callable(v)}
        resources = Resources(
            name=self.fn.__name__,
            arch=arch,
            num_warps=kernel.metadata.num_warps,
            num_stages=kernel.metadata.num_stages,
            registers=registers,
            spill_bytes=spills,
            shared_bytes=kernel.metadata.shared,
            tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
            instructions=dict(opcode_counts(sass)),
            constants=constants,
        )
        return resources, sass

    def most_programs(device: Any, num_warps: int) -> int:
        return 4 if multiprocessors is None else multiprocessors * (16 // num_warps)

    run = triton.runtime.JITFunction.run
    with (
        mock.patch.object(rows, "most_programs", most_programs),
        mock.patch.object(triton.runtime.driver, "_active", _DriverWithoutGPU(arch)),
        mock.patch.object(triton.runtime.JITFunction, "run", compile_only),
        mock.patch.object(backend, "interpreting", return_value=True),  # CPU tensors may take the Triton path
        mock.patch.object(backend, "architecture", return_value=arch),
        use_backend("triton"),
    ):
        yield found
