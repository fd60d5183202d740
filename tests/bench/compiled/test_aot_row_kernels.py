"""What the compiler makes of the kernels of LayerNorm, GELU and the embeddings, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Each operator's call for a case; CASES is a list of [arch, *arguments of the call].
COMPILE = """
import json, sys, torch
from fusebert.bench.compiled.aot import compiled_kernels
from fusebert.kernels import bias_gelu, dropout_add_layernorm, embed_layernorm

def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, requires_grad=True)

def layernorm(H, p, has_linear_bias, dtype="bfloat16"):
    x, residual = (ones(64, H, dtype=getattr(torch, dtype)) for _ in range(2))
    linear_bias = ones(H) if has_linear_bias else None
    return dropout_add_layernorm(x, residual, ones(H), ones(H), linear_bias=linear_bias, p=p, seed=1)

def gelu(I, approximate):
    return bias_gelu(ones(64, I, dtype=torch.bfloat16), ones(I), approximate=approximate)

def embed(H):
    ids = torch.zeros(64, dtype=torch.int64)
    options = dict(eps=1e-12, p=0.1, seed=1, padding_idx=0, out_dtype=torch.bfloat16)
    return embed_layernorm(ids, ids, ids, ones(64, H), ones(64, H), ones(64, H), ones(H), ones(H), **options)

call, cases = {"layernorm": layernorm, "gelu": gelu, "embed": embed}[sys.argv[1]], json.loads(sys.argv[2])
rows = []
for case in cases:
    arch, *arguments = case
    with compiled_kernels(arch) as found:
        y = call(*arguments)
        y.backward(torch.ones_like(y))
    for r in found:
        row = dict(case=case, name=r.name, spills=r.spill_bytes, registers=r.registers, shared=r.shared_bytes)
        row |= dict(loads=r.count_wide("LDG"), wide_stores=r.count_wide("STG"), stores=r.count("STG"))
        rows.append(row | dict(minima=r.count("FMNMX.NAN"), programs=r.blocks_per_multiprocessor))
print(json.dumps(rows))
"""


def compiled(tmp_path: Path, operator: str, cases: list[list[Any]]) -> list[dict[str, Any]]:
    """A row for each kernel of each case; wide loads and stores move 16 bytes a thread."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, operator, json.dumps(cases)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    rows: list[dict[str, Any]] = json.loads(ran.stdout)
    assert all(row["programs"] > 0 for row in rows), rows  # registers and shared memory suffice
    return rows


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


def test_layernorm(tmp_path: Path) -> None:
    """Nothing spills, a multiprocessor holds at least 16 warps, and in bf16 rows move 16 bytes a thread at a time."""
    rows = compiled(tmp_path, "layernorm", NARROW + WIDE)
    assert [row["case"] for row in rows] == [case for case in NARROW + WIDE for _ in range(3)]
    for row in rows:
        assert row["spills"] == 0, row
        # The widest rows take 16 warps a program, the others 8.
        assert row["name"] != "layernorm_backward" or row["programs"] >= (1 if row["case"] in WIDE else 2), row
    found = {row["name"]: row for row in rows if row["case"] == BASE}
    assert found.keys() == {"layernorm_forward", "layernorm_backward", "rows_sum_partials"}
    # A row of 768 in one warp: 3 loads of x, 3 of residual and 6 of each float32 parameter; y and s stored in 3 each,
    # mean and rstd in one narrow store each.
    forward = found["layernorm_forward"]
    assert (forward["loads"], forward["wide_stores"], forward["stores"]) == (18, 6, 8)
    # 16 elements of each tensor a thread: every store is wide (dx, dresidual, and the partial sums).
    backward = found["layernorm_backward"]
    assert backward["loads"] >= 4
    assert backward["wide_stores"] == backward["stores"]


def test_bias_gelu(tmp_path: Path) -> None:
    """BERT-base's inner width in bf16: nothing spills, rows move 16 bytes a thread at a time.

    NaN passes through the one minimum that every element takes, which the interpreter cannot show.
    """
    rows = compiled(
        tmp_path, "gelu", [[arch, 3072, approximate] for arch in (80, 90) for approximate in ("none", "tanh")]
    )
    assert {row["name"] for row in rows} == {"bias_gelu_forward", "bias_gelu_backward", "rows_sum_partials"}
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] <= 64, row  # 1024 threads a multiprocessor, or more
        counts = [row[name] for name in ("loads", "wide_stores", "stores", "minima")]
        if row["name"] == "bias_gelu_forward":  # 32 elements a thread: 4 loads of x and one of bias
            assert counts == [5, 4, 4, 32]
        if row["name"] == "bias_gelu_backward":  # 16 elements a thread; the partial sums are stored narrower, once
            assert counts[0] >= 4
            assert counts[1::2] == [2, 16]


def test_embed_layernorm(tmp_path: Path) -> None:
    """float32 tables, bf16 out, on sm_90: BERT-base's width moves 16 bytes a thread at a time; the widest fits."""
    rows = compiled(tmp_path, "embed", [[90, 768], [90, 16384]])
    # What a block may have on the GPUs with the least, sm_86 and sm_120.
    assert all(row["shared"] <= 99 * 1024 for row in rows), rows
    base = {row["name"].removeprefix("embed_layernorm_"): row for row in rows if row["case"] == [90, 768]}
    assert base.keys() == {"forward", "backward", "rows_sum_partials", "sum_runs", "join_runs"}
    assert all(row["spills"] == 0 for row in base.values()), base
    # A row of 768 float32 in one warp: 6 loads for each of three tables and two parameters, 3 stores of bf16.
    assert (base["forward"]["loads"], base["forward"]["wide_stores"]) == (30, 3)
    # Two blocks of 8 warps a multiprocessor, which the grid needs.
    assert base["backward"]["registers"] <= 128
    assert base["backward"]["loads"] >= 4 * 2
    assert base["sum_runs"]["loads"] == 2
