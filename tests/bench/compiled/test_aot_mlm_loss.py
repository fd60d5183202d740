"""The masked-LM loss kernels compiled without a GPU: no spills, loads of 16 bytes, the matrix instructions meant."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: TRITON_INTERPRET, which the other tests need, replaces the compiler for good.
CHUNKED = """
import torch
from fusebert.bench.compiled.aot import compiled_kernels
from fusebert.kernels import masked_lm_loss

for dtype in (torch.bfloat16, torch.float32):
    for options in ({}, {"label_smoothing": 0.1, "reduction": "none"}):
        hidden, weight = (torch.randn(n, 64, dtype=dtype, requires_grad=True) for n in (32, 30522))
        bias = torch.zeros(30522, requires_grad=True)
        with compiled_kernels(90) as found:
            masked_lm_loss(hidden, weight, bias, torch.arange(32), **options).sum().backward()
        for kernel in found:
            loads, stores = (kernel.count(op) for op in ("LDG.E.128", "STG.E.128"))
            print(kernel.name, kernel.registers, kernel.spill_bytes, loads, stores)
"""

LEAN = """
import sys
import torch
from fusebert.bench.compiled.aot import LIMITS, compiled_kernels
from fusebert.kernels import masked_lm_loss

arch = int(sys.argv[1])
hidden, weight = (torch.randn(n, 768, dtype=torch.bfloat16, requires_grad=True) for n in (300, 30522))
bias = torch.zeros(30522, requires_grad=True)
with compiled_kernels(arch) as found:
    masked_lm_loss(hidden, weight, bias, torch.zeros(300, dtype=torch.int64), lean=True).backward()
for kernel in found:
    matrix = kernel.count({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch])
    fits = int(kernel.shared_bytes <= LIMITS[arch][2])
    print(kernel.name, kernel.spill_bytes, fits, matrix, kernel.count_wide("LDG"), kernel.count("STG.E.128"))
"""


def run(program, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return [(name, *map(int, numbers)) for name, *numbers in (line.split() for line in result.stdout.splitlines())]


def test_chunked_kernels_do_not_spill_and_load_wide():
    kernels = run(CHUNKED)
    assert {name for name, *_ in kernels} == {"cross_entropy_forward", "cross_entropy_backward", "mlm_chunked_scale"}
    for name, registers, spills, loads, stores in kernels:
        assert spills == 0, name
        assert registers <= 128, name  # 512 threads a multiprocessor, or more
        assert loads >= 2, name
        assert stores >= 2 or name == "cross_entropy_forward", name


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_lean_kernels_multiply_on_tensor_cores_without_spills(arch):
    """30522 words, no multiple of 8: the loads are 16 bytes all the same, as the contiguous axis is H."""
    kernels = run(LEAN, arch)
    assert {name for name, *_ in kernels} == {"mlm_lean_forward", "mlm_lean_merge", "mlm_lean_backward"}
    products = [kernel for kernel in kernels if kernel[0] != "mlm_lean_merge"]
    for name, spills, fits, matrix, loads, stores in products:
        assert spills == 0, name
        assert fits, name
        assert matrix >= 4, name
        assert loads >= 16, name
        assert stores >= 2 or name == "mlm_lean_forward", name
