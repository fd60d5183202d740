"""The masked-LM loss kernels compiled for sm_90 without a GPU: no spills, and 16 bytes a load and store."""

from __future__ import annotations

import os
import subprocess
import sys

# In a process of its own: TRITON_INTERPRET, which the other tests need, replaces the compiler for good.
PROGRAM = """
import torch
from fusebert.bench.aot import compiled_kernels
from fusebert.kernels.mlm_loss import masked_lm_loss

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


def test_compiled_kernels_do_not_spill_and_load_wide():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, *_ in kernels} == {"_row_statistics", "_logits_gradient", "_scale"}
    for name, registers, spills, loads, stores in kernels:
        assert int(spills) == 0, name
        assert int(registers) <= 128, name  # 512 threads a multiprocessor, or more
        assert int(loads) >= 2, name
        assert int(stores) >= 2 or name == "_row_statistics", name
