"""What the compiler makes of the kernels for a GPU that is not here: registers, spills, shared memory, instructions.

Triton needs no GPU to compile. `compiled_kernels` stands in for the driver, so that calling an operator on CPU tensors
compiles, for the architecture named, exactly what its launcher would launch there (same tiles, warps, alignment), and
launches nothing: outputs are whatever the allocator returned. The resources are read from the cubin with the tools
that Triton's wheel carries.

Run as a program it prints the table for every operator: ``python -m fusebert.bench.aot --arch 90``.
Not under ``TRITON_INTERPRET=1``: that decides, at import, that nothing is ever compiled.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..kernels import (
    attention_config,
    attention_varlen,
    backend,
    dropout_add_layernorm,
    layernorm,
    masked_lm_loss,
    use_backend,
)
from ..kernels._triton import interpreting, triton

# Per multiprocessor: registers, warps, shared memory a block may have (CUDA C programming guide, compute capabilities).
LIMITS = {80: (65536, 64, 163 * 1024), 90: (65536, 64, 227 * 1024), 100: (65536, 64, 227 * 1024)}


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
    instructions: dict[str, int]  # SASS opcode -> how often it stands in the code
    constants: dict[str, Any]

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Resident blocks that registers, warps and shared memory allow."""
        registers, warps, shared = LIMITS[self.arch]
        # Registers are handed out by warp in units of 256.
        a_warp = -(-self.registers * 32 // 256) * 256
        by_registers = registers // (a_warp * self.num_warps)
        by_shared = shared // max(self.shared_bytes, 1)
        return min(by_registers, warps // self.num_warps, by_shared, 32)

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
        mock.patch.object(attention_config, "architecture", return_value=arch),
        use_backend("triton"),
    ):
        yield found


def _attention(seqlen: int, head_dim: int, dropout_p: float, dtype: torch.dtype) -> None:
    qkv = torch.randn(2 * seqlen, 3, 2, head_dim, dtype=dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32)
    attention_varlen(qkv, cu_seqlens, seqlen, dropout_p=dropout_p, seed=1).sum().backward()


def _dropout_add_layernorm(hidden_size: int, p: float, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(64, hidden_size, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(2))
    dropout_add_layernorm(x, residual, weight, bias, p=p, seed=1).sum().backward()


def _layernorm(hidden_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(64, hidden_size, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(2))
    layernorm(x, weight, bias).sum().backward()


def _masked_lm_loss(vocab_size: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(32, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, 64, dtype=dtype, requires_grad=True)
    bias = torch.zeros(vocab_size, dtype=dtype, requires_grad=True)
    loss = masked_lm_loss(hidden, weight, bias, torch.arange(32))
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def cases(dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], None]]:
    """Name -> a call of an operator, forward and backward, at the shapes that matter."""
    found: dict[str, Callable[[], None]] = {}
    for seqlen in (64, 128, 512):
        for head_dim in (64, 128):
            for p in (0.0, 0.1):
                found[f"attention N={seqlen} D={head_dim} dropout={p}"] = lambda n=seqlen, d=head_dim, p=p: _attention(
                    n, d, p, dtype
                )
    for hidden_size in (256, 768, 1024, 4096):
        for p in (0.0, 0.1):
            found[f"dropout_add_layernorm H={hidden_size} dropout={p}"] = lambda h=hidden_size, p=p: (
                _dropout_add_layernorm(h, p, dtype)
            )
        found[f"layernorm H={hidden_size}"] = lambda h=hidden_size: _layernorm(h, dtype)
    for vocab_size in (8192, 30522):
        found[f"masked_lm_loss V={vocab_size}"] = lambda v=vocab_size: _masked_lm_loss(v, dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of every kernel, compiled for a GPU that need not be here.")
    parser.add_argument(
        "--arch", type=int, default=90, choices=sorted(LIMITS), help="compute capability, e.g. 90 for Hopper"
    )
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    rows = []
    print(f"{'case':44} {'kernel':34} warps regs spill shared blocks  matrix   ld128 st128")
    for name, call in cases().items():
        if args.only not in name:
            continue
        with compiled_kernels(args.arch) as found:
            call()
        for r in found:
            rows.append(
                {"case": name, **dataclasses.asdict(r), "blocks_per_multiprocessor": r.blocks_per_multiprocessor}
            )
            matrix = next((f"{r.count(op)} {op}" for op in ("UTCHMMA", "HGMMA", "HMMA") if r.count(op)), "-")
            wide = r.count_wide("LDG"), r.count_wide("STG")
            print(
                f"{name:44} {r.name:34} {r.num_warps:5} {r.registers:4} {r.spill_bytes:5} {r.shared_bytes:6} "
                f"{r.blocks_per_multiprocessor:6}  {matrix:9} {wide[0]:4} {wide[1]:5}"
            )
            sys.stdout.flush()
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
