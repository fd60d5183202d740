"""Attention's kernels as the compiler sees them, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, sys, torch
from fusebert.bench.aot import LIMITS, compiled_kernels
from fusebert.kernels import attention_varlen
arch, rows = int(sys.argv[1]), []
for seqlen in (64, 128, 512):
    qkv = torch.zeros(2 * seqlen, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32)
    with compiled_kernels(arch) as found:
        attention_varlen(qkv, cu_seqlens, seqlen, dropout_p=0.1, seed=1).sum().backward()
    for r in found:
        fits = r.shared_bytes <= LIMITS[arch][2]
        rows.append([r.name, seqlen, r.spill_bytes, fits, r.count("HGMMA"), r.count("HMMA"), r.count("STG.E.128")])
print(json.dumps(rows))
"""


@pytest.mark.parametrize(("arch", "matrix"), [(80, "HMMA"), (90, "HGMMA")])
def test_what_berts_head_size_compiles_to(arch: int, matrix: str, tmp_path: Path) -> None:
    """D = 64, bf16, dropout: the route meant for the length, nothing spilled, matrix instructions, wide stores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)
    names = [(name, seqlen) for name, seqlen, *_ in rows]
    assert ("short_forward", 128) in names
    assert ("long_backward_dk_dv", 512) in names
    for name, seqlen, spills, fits, hgmma, hmma, wide_stores in rows:
        what = f"{name} at N = {seqlen}"
        assert spills == 0, f"{what} spills {spills} bytes"
        assert fits, f"{what} does not fit the shared memory"
        assert (hgmma if matrix == "HGMMA" else hmma) > 0, f"{what} does not use {matrix}"
        assert wide_stores > 0, f"{what} stores less than 16 bytes a thread"
