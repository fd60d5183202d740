"""LayerNorm's kernels as the compiler sees them, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, torch
from fusebert.bench.compiled.aot import compiled_kernels
from fusebert.kernels import dropout_add_layernorm
rows = []
for case in CASES:
    arch, hidden_size, p, biased, *dtype = case
    dtype = getattr(torch, *dtype) if dtype else torch.bfloat16
    x, residual = (torch.ones(64, hidden_size, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, linear_bias = (torch.ones(hidden_size, requires_grad=True) for _ in range(3))
    with compiled_kernels(arch) as found:
        y = dropout_add_layernorm(x, residual, weight, bias, linear_bias=linear_bias if biased else None, p=p, seed=1)
        y.sum().backward()
    for r in found:
        wide = [r.count_wide("LDG"), r.count_wide("STG"), r.count("STG")]
        assert r.blocks_per_multiprocessor > 0, r  # registers and shared memory suffice
        rows.append([case, r.name, r.spill_bytes, r.blocks_per_multiprocessor, wide])
print(json.dumps(rows))
"""
BASE = [90, 768, 0.1, False]  # BERT-base
NARROW = [BASE, [100, 768, 0.1, False], [90, 768, 0.1, True], [100, 1000, 0.1, False], [80, 1024, 0.1, True]]
# From whole rows to rows that two and four programs share; float32 takes the most registers and shared memory.
WIDE = [
    [90, 4096, 0.1, True],
    [80, 5120, 0.1, False],
    [100, 8192, 0.1, True],
    [100, 16384, 0.0, True],
    [90, 16384, 0.1, False],
    [80, 16384, 0.1, True, "float32"],
]
CASES = NARROW + WIDE


def test_registers_and_wide_accesses(tmp_path: Path) -> None:
    """Nothing spills, a multiprocessor holds 16 warps at least, and in bf16 rows move 16 bytes a thread at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"CASES = {CASES}\n{COMPILE}"]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)
    assert [case for case, *_ in rows] == [case for case in CASES for _ in range(3)]
    for case, name, spills, blocks, _ in rows:
        assert spills == 0, (case, name)
        # The widest rows take 16 warps a program, the others 8.
        assert name != "_backward" or blocks >= (1 if case in WIDE else 2), (case, blocks)
    found = {name: wide for case, name, _, _, wide in rows if case == BASE}
    assert found.keys() == {"_forward", "_backward", "sum_partials"}
    # Forward, a row of 768 in one warp: 3 loads of x, 3 of residual and 6 of each float32 parameter; y and s stored in
    # 3 each, mean and rstd in one narrow store each.
    assert found["_forward"] == [18, 6, 8]
    # Backward, 16 elements of each tensor a thread: every store is wide (dx, dresidual, and the partial sums).
    loads, wide_stores, stores = found["_backward"]
    assert loads >= 4
    assert wide_stores == stores
