"""The ahead-of-time table: resources of every kernel, compiled for GPUs that need not be here.

    python -m fusebert.bench.aot --arch 80 90 100 120                        # prints it
    python -m fusebert.bench.aot --arch 80 90 100 120 --out bench/results    # also writes a JSON file an architecture

A kernel of attention that spills, does not fit or misses its chip's matrix instructions is named, and the exit status
is 1. Another Triton comes first in PYTHONPATH (``make aot`` installs each in a folder of its own), and its files carry
its version. Not under ``TRITON_INTERPRET=1``, which replaces the compiler when Triton is imported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import multiprocessing
import os
import sys
from pathlib import Path

import torch

from ...kernels import backend
from ...kernels.attn.config import TABLES_OF
from ...kernels.backend import triton
from ..measure.result import AotAbout, AotResult, CompiledKernel, write_result
from . import attention_cases
from .aot import LIMITS, Resources, compiled_kernels
from .cases import cases


def _kernel(case: str, r: Resources) -> CompiledKernel:
    matrix = r.matrix_instruction
    return CompiledKernel(
        case=case,
        kernel=r.name,
        tile=[r.constants[name] for name in ("BLOCK_M", "BLOCK_N") if name in r.constants] or None,
        warps=r.num_warps,
        stages=r.num_stages,
        instructions=sum(r.instructions.values()),
        registers=r.registers,
        spill_bytes=r.spill_bytes,
        shared_bytes=r.shared_bytes,
        tensor_memory_columns=r.tensor_memory_columns,
        blocks_per_multiprocessor=r.blocks_per_multiprocessor,
        limited_by=r.limited_by,
        matrix=f"{r.count(matrix)} {matrix}" if matrix else None,
        loads_128=r.count_wide("LDG"),
        stores_128=r.count_wide("STG"),
        problems=attention_cases.problems(r) if case.startswith("attention") else [],
    )


def _compile(arch: int, name: str, heaviest: bool) -> list[CompiledKernel]:
    """The kernels of one case; runs in a process of the pool."""
    with compiled_kernels(arch) as found:
        cases(arch, heaviest=heaviest)[name]()
    return [_kernel(name, r) for r in found]


def _print(row: CompiledKernel) -> None:
    print(
        f"{row.case:58} {row.kernel:28} {row.tile or ''!s:10} {row.warps:2} {row.registers:4} "
        f"{row.spill_bytes:5} {row.shared_bytes:6} {row.blocks_per_multiprocessor:3} {row.limited_by:13} "
        f"{row.matrix or '-':9} {row.loads_128:4} {row.stores_128:4} {'; '.join(row.problems)}",
        flush=True,
    )


def _write(out: Path, arch: int, rows: list[CompiledKernel]) -> None:
    about = AotAbout(
        date=f"{datetime.date.today()}",
        arch=f"sm_{arch}",
        triton=triton.__version__,
        attention_sources=attention_cases.sources(),
        torch=torch.__version__,
        timed="nothing: compiled without a GPU",
    )
    version = ".".join(map(str, backend.triton_version()))
    name = "aot" if backend.triton_version() == TABLES_OF else f"aot-triton_{version}"
    write_result(out / f"{about.date}-{name}-sm_{arch}.json", AotResult(about, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of every kernel, compiled for a GPU that need not be here.")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90], choices=sorted(LIMITS), help="compute capabilities, 90 for Hopper"
    )
    parser.add_argument("--only", default="", help="only the cases with this in their name")
    parser.add_argument(
        "--heaviest", action="store_true", help="of attention, one variant for each entry of its tables"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--out", type=Path, help="also write a table for each architecture to this folder, as JSON")
    args = parser.parse_args()
    print(f"{'case':58} {'kernel':28} tile       warps regs spill shared blocks of     matrix   ld128 st128")
    wrong = 0
    spawn = multiprocessing.get_context("spawn")  # Triton does not work in a forked process
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for arch in args.arch:
            names = [name for name in cases(arch, heaviest=args.heaviest) if args.only in name]
            rows = []
            for found in pool.map(functools.partial(_compile, arch, heaviest=args.heaviest), names):
                rows += found
                for row in found:
                    _print(row)
            wrong += sum(bool(row.problems) for row in rows)
            if args.out:
                _write(args.out, arch, rows)
    sys.exit(1 if wrong else 0)
