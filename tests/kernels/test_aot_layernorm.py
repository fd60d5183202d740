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
import dataclasses, json, torch
from fusebert.bench.aot import compiled_kernels
from fusebert.kernels import dropout_add_layernorm
x, residual = (torch.ones(64, 768, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
weight, bias = (torch.ones(768, requires_grad=True) for _ in range(2))
with compiled_kernels(90) as found:
    dropout_add_layernorm(x, residual, weight, bias, p=0.1, seed=1).sum().backward()
print(json.dumps({r.name: [r.spill_bytes, r.count_wide("LDG"), r.count_wide("STG"), r.count("STG")] for r in found}))
"""


def test_registers_and_wide_accesses(tmp_path: Path) -> None:
    """BERT-base's width in bf16 on sm_90: nothing spills, rows move 16 bytes a thread at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.keys() == {"_forward", "_backward", "sum_partials"}
    assert all(spills == 0 for spills, *_ in found.values()), found
    # Forward, a row of 768 in one warp: 3 loads of x, 3 of residual and 6 of each float32 parameter; y and s stored in
    # 3 each, mean and rstd in one narrow store each.
    assert found["_forward"] == [0, 18, 6, 8]
    # Backward, 16 elements of each tensor a thread: every store is wide (dx, dresidual, and the partial sums).
    _, loads, wide_stores, stores = found["_backward"]
    assert loads >= 4
    assert wide_stores == stores
