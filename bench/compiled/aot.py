"""What the compiler makes of the kernels for a GPU that is not here: registers, spills, shared memory, instructions.

Triton needs no GPU to compile. `compiled_kernels` stands in for the driver, so that calling an operator on CPU tensors
compiles, for the architecture named, exactly what its launcher would launch there (same tiles, warps, alignment), and
launches nothing: outputs are whatever the allocator returned. The resources are read from the cubin with the tools
that Triton's wheel carries.

Run as a program it prints the table for every operator: ``python -m fusebert.bench.aot --arch 80 90 100``, and with
``--out bench/results`` writes it there; attention in every way its tables allow (`aot_attention`). A kernel of
attention that spills, does not fit or misses its chip's matrix instructions is named, and the status is 1.
Not under ``TRITON_INTERPRET=1``: that decides, at import, that nothing is ever compiled.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from ...kernels import (
    backend,
    bias_gelu,
    dropout_add_layernorm,
    embed_layernorm,
    layernorm,
    use_backend,
)
from ...kernels.backend import interpreting, triton
from ..operators.gelu_linear_epilogue import gelu_linear
from ..operators.linear_gelu_epilogue import TILINGS, linear_gelu
from . import aot_attention, aot_mlm_loss

# Per multiprocessor: registers, warps, shared memory a block may have (CUDA C programming guide, compute capabilities).
LIMITS = {80: (65536, 64, 163 * 1024), 90: (65536, 64, 227 * 1024), 100: (65536, 64, 227 * 1024)}
MAX_BLOCKS = 32
TENSOR_MEMORY_COLUMNS = 512  # sm_100's, of a multiprocessor (PTX ISA, tcgen05)
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@dataclasses.dataclass(frozen=True)
class Resources:
    """One compiled kernel. Bytes are bytes, registers are a thread's."""

    name: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int  # sm_100; a power of two
    instructions: dict[str, int]  # SASS opcode -> how often it stands in the code
    constants: dict[str, Any]

    def _blocks(self) -> dict[str, int]:
        """Resident blocks of a multiprocessor, by what runs out."""
        registers, warps, shared = LIMITS[self.arch]
        a_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out by warp in units of 256
        return {
            "registers": registers // (a_warp * self.num_warps),
            "shared memory": shared // max(self.shared_bytes, 1),
            "warps": warps // self.num_warps,
            "tensor memory": TENSOR_MEMORY_COLUMNS // max(self.tensor_memory_columns, 1),
            "blocks": MAX_BLOCKS,
        }

    @property
    def blocks_per_multiprocessor(self) -> int:
        return min(self._blocks().values())

    @property
    def limited_by(self) -> str:
        blocks = self._blocks()
        return min(blocks, key=lambda resource: blocks[resource])

    @property
    def matrix_instruction(self) -> str | None:
        return next((op for op in ("UTCHMMA", "HGMMA", "HMMA") if self.count(op)), None)

    def count(self, prefix: str) -> int:
        """Instructions whose opcode starts with ``prefix``, e.g. "HGMMA" or "LDG"."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))

    def count_wide(self, prefix: str) -> int:
        """Those of 128 bits: "LDG" for loads to registers (LDG) and to shared memory (LDGSTS), "STG" for stores."""
        return sum(
            n for opcode, n in self.instructions.items() if opcode.startswith(prefix) and "128" in opcode.split(".")
        )


class _AbsentGPU:
    """The part of Triton's driver interface that compiling asks for."""

    def __init__(self, arch: int) -> None:
        self._target = triton.backends.compiler.GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return -self._target.arch  # an index no GPU has: nothing compiled here is found by a real launch

    def get_current_stream(self, device: int) -> int:
        return 0


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes) -> tuple[int, int, collections.Counter[str]]:
    """(registers, spill bytes, opcode counts) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage.stdout))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage.stdout))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass.stdout, re.MULTILINE)
    return registers, stack, collections.Counter(opcodes)


@contextlib.contextmanager
def compiled_kernels(arch: int = 90) -> Iterator[list[Resources]]:
    """Within the block, operators on CPU tensors compile for ``sm_<arch>`` and append their `Resources` to the list.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, or a kernel does not compile.
    """
    if interpreting():
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter replaces the compiler for the whole process")
    found: list[Resources] = []
    seen: set[int] = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) in seen:
            return kernel
        seen.add(id(kernel))
        registers, spills, instructions = _read_cubin(kernel.asm["cubin"])
        names = {(i,): name for i, name in enumerate(self.arg_names)}
        constants = {names.get(k, str(k)): v for k, v in kernel.src.constants.items() if not callable(v)}
        found.append(
            Resources(
                name=self.fn.__name__,
                arch=arch,
                num_warps=kernel.metadata.num_warps,
                num_stages=kernel.metadata.num_stages,
                registers=registers,
                spill_bytes=spills,
                shared_bytes=kernel.metadata.shared,
                tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
                instructions=dict(instructions),
                constants=constants,
            )
        )
        return kernel

    run = triton.runtime.JITFunction.run
    with (
        mock.patch.object(triton.runtime.driver, "_active", _AbsentGPU(arch)),
        mock.patch.object(triton.runtime.JITFunction, "run", compile_only),
        mock.patch.object(backend, "interpreting", return_value=True),  # CPU tensors may take the Triton path
        mock.patch.object(backend, "architecture", return_value=arch),
        use_backend("triton"),
    ):
        yield found


def _dropout_add_layernorm(hidden_size: int, p: float, biased: bool, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(64, hidden_size, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, of_linear = (torch.randn(hidden_size, requires_grad=True) for _ in range(3))
    y = dropout_add_layernorm(x, residual, weight, bias, linear_bias=of_linear if biased else None, p=p, seed=1)
    y.sum().backward()


def _layernorm(hidden_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(64, hidden_size, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(2))
    layernorm(x, weight, bias).sum().backward()


def _bias_gelu(width: int, approximate: Literal["none", "tanh"], dtype: torch.dtype) -> None:
    x = torch.randn(64, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(width, requires_grad=True)
    bias_gelu(x, bias, approximate=approximate).sum().backward()


def _linear_gelu(hidden_size: int, tiling: str, dtype: torch.dtype) -> None:
    x, weight = (torch.empty(rows, hidden_size, dtype=dtype) for rows in (64, 4 * hidden_size))
    linear_gelu(x, weight, torch.empty(4 * hidden_size), tiling=tiling)


def _gelu_linear(hidden_size: int, tiling: str, dtype: torch.dtype) -> None:
    x, weight = (torch.empty(rows, 4 * hidden_size, dtype=dtype, requires_grad=True) for rows in (64, hidden_size))
    bias = torch.empty(4 * hidden_size, requires_grad=True)
    gelu_linear(x, bias, weight, tiling=tiling).backward(torch.empty(64, hidden_size, dtype=dtype))


def _embed_layernorm(hidden_size: int, p: float, dtype: torch.dtype) -> None:
    words, types, positions = (torch.randn(rows, hidden_size, requires_grad=True) for rows in (100, 2, 64))
    weight, bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(2))
    ids = torch.zeros(64, dtype=torch.int64)
    out = embed_layernorm(ids, ids, ids, words, types, positions, weight, bias, eps=1e-12, p=p, seed=1, out_dtype=dtype)
    out.sum().backward()


def cases(arch: int, dtype: torch.dtype = torch.bfloat16, *, heaviest: bool = False) -> dict[str, Callable[[], None]]:
    """Name -> a call of an operator, forward and backward, at the shapes that matter.

    heaviest: of attention, one variant for each entry of its tables.
    """
    found: dict[str, Callable[[], None]] = aot_attention.cases(arch, heaviest=heaviest)
    for hidden_size in (256, 768, 1000, 1024, 4096, 5120, 8192, 16384):
        for p, biased in itertools.product((0.0, 0.1), (False, True)):
            name = f"dropout_add_layernorm H={hidden_size} dropout={p}" + (" linear_bias" if biased else "")
            found[name] = functools.partial(_dropout_add_layernorm, hidden_size, p, biased, dtype)
        found[f"layernorm H={hidden_size}"] = functools.partial(_layernorm, hidden_size, dtype)
    found["embed_layernorm H=768 dropout=0.1"] = functools.partial(_embed_layernorm, 768, 0.1, dtype)
    found["bias_gelu I=3072 erf"] = functools.partial(_bias_gelu, 3072, "none", dtype)
    found["bias_gelu I=3072 tanh"] = functools.partial(_bias_gelu, 3072, "tanh", dtype)
    for hidden_size, tiling in itertools.product((768, 1024), TILINGS):
        found[f"linear_gelu H={hidden_size} {tiling}"] = functools.partial(_linear_gelu, hidden_size, tiling, dtype)
        found[f"gelu_linear H={hidden_size} {tiling}"] = functools.partial(_gelu_linear, hidden_size, tiling, dtype)
    found |= aot_mlm_loss.cases(dtype)
    return found


def _summary(case: str, r: Resources) -> dict[str, Any]:
    matrix = r.matrix_instruction
    return {
        "case": case,
        "kernel": r.name,
        "tile": [r.constants[name] for name in ("BLOCK_M", "BLOCK_N") if name in r.constants] or None,
        "warps": r.num_warps,
        "stages": r.num_stages,
        "instructions": sum(r.instructions.values()),
        "registers": r.registers,
        "spill_bytes": r.spill_bytes,
        "shared_bytes": r.shared_bytes,
        "tensor_memory_columns": r.tensor_memory_columns,
        "blocks_per_multiprocessor": r.blocks_per_multiprocessor,
        "limited_by": r.limited_by,
        "matrix": f"{r.count(matrix)} {matrix}" if matrix else None,
        "loads_128": r.count_wide("LDG"),
        "stores_128": r.count_wide("STG"),
        "problems": aot_attention.problems(r, LIMITS[r.arch][2], MATRIX[r.arch]) if "EXACT" in r.constants else [],
    }


def _rows(arch: int, name: str, heaviest: bool) -> list[dict[str, Any]]:
    """One case's kernels, in a process of the pool."""
    with compiled_kernels(arch) as found:
        cases(arch, heaviest=heaviest)[name]()
    return [_summary(name, r) for r in found]


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:58} {row['kernel']:20} {row['tile'] or ''!s:10} {row['warps']:2} {row['registers']:4} "
        f"{row['spill_bytes']:5} {row['shared_bytes']:6} {row['blocks_per_multiprocessor']:3} {row['limited_by']:13} "
        f"{row['matrix'] or '-':9} {row['loads_128']:4} {row['stores_128']:4} {'; '.join(row['problems'])}",
        flush=True,
    )


def _write(out: Path, arch: int, rows: list[dict[str, Any]]) -> None:
    about = {"date": f"{datetime.date.today()}", "arch": f"sm_{arch}", "triton": triton.__version__}
    about |= {
        "attention_sources": aot_attention.sources(),
        "torch": torch.__version__,
        "timed": "nothing: compiled without a GPU",
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = out / f"{about['date']}-aot-sm_{arch}.json"
    path.write_text(f'{{"about": {json.dumps(about)}, "kernels": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of every kernel, compiled for a GPU that need not be here.")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90], choices=sorted(LIMITS), help="compute capabilities, 90 for Hopper"
    )
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--heaviest", action="store_true", help="of attention, one variant an entry of its tables")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--out", type=Path, help="also write a table for each architecture to this folder, as JSON")
    args = parser.parse_args()
    print(f"{'case':58} kernel               tile       warps regs spill shared blocks of     matrix   ld128 st128")
    wrong = 0
    spawn = multiprocessing.get_context("spawn")  # Triton and fork() do not mix
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for arch in args.arch:
            names = [name for name in cases(arch, heaviest=args.heaviest) if args.only in name]
            rows = []
            for found in pool.map(functools.partial(_rows, arch, heaviest=args.heaviest), names):
                rows += found
                for row in found:
                    _print(row)
            wrong += sum(bool(row["problems"]) for row in rows)
            if args.out:
                _write(args.out, arch, rows)
    sys.exit(1 if wrong else 0)
