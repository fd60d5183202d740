"""What the compiler makes of the kernels of LayerNorm, GELU and the embeddings, for GPUs that need not be here."""

import pytest

pytest.importorskip("triton")

from compiled import compile_kernels

from fusebert.bench.compiled.aot import LIMITS

CALL = """
import torch
from fusebert.kernels import bias_gelu, dropout_add_layernorm, embed_layernorm

def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, requires_grad=True)

def layernorm(H, p, has_linear_bias, dtype="bfloat16"):
    x, residual = (ones(64, H, dtype=getattr(torch, dtype)) for _ in range(2))
    linear_bias = ones(H) if has_linear_bias else None
    return dropout_add_layernorm(x, residual, ones(H), ones(H), linear_bias=linear_bias, p=p, seed=1)

def gelu(approximate):
    return bias_gelu(ones(64, 3072, dtype=torch.bfloat16), ones(3072), approximate=approximate)

def embed(H):
    ids = torch.zeros(64, dtype=torch.int64)
    options = dict(eps=1e-12, p=0.1, seed=1, padding_idx=0, out_dtype=torch.bfloat16)
    return embed_layernorm(ids, ids, ids, ones(64, H), ones(64, H), ones(64, H), ones(H), ones(H), **options)

def call(operator, **arguments):
    y = globals()[operator](**arguments)
    y.backward(torch.ones_like(y))
"""


def layernorm(arch, hidden_size, p, has_linear_bias, dtype="bfloat16"):
    options = {"H": hidden_size, "p": p, "has_linear_bias": has_linear_bias, "dtype": dtype}
    return {"arch": arch, "operator": "layernorm", **options}


NARROW = [
    layernorm(90, 768, 0.1, False),  # BERT-base
    layernorm(100, 768, 0.1, False),
    layernorm(90, 768, 0.1, True),
    layernorm(100, 1000, 0.1, False),
    layernorm(80, 1024, 0.1, True),
]
# From whole rows to rows that two and four programs share; float32 takes the most registers and shared memory.
WIDE = [
    layernorm(90, 4096, 0.1, True),
    layernorm(80, 5120, 0.1, False),
    layernorm(100, 8192, 0.1, True),
    layernorm(100, 16384, 0.0, True),
    layernorm(90, 16384, 0.1, False),
    layernorm(80, 16384, 0.1, True, "float32"),
]


def test_the_widest_rows_fit_the_smallest_shared_memory():
    """sm_86, sm_89 and sm_120 have 99 KiB for a block; with two stages dlinear_bias would need 112."""
    (kernels,) = compile_kernels(CALL, layernorm(120, 16384, 0.1, True))
    assert max(kernel.shared_bytes for kernel in kernels) <= LIMITS[120].shared_bytes


def test_layernorm():
    """Nothing spills, a multiprocessor holds at least 16 warps, and in bf16 rows move 16 bytes a thread at a time."""
    found = compile_kernels(CALL, *NARROW, *WIDE)
    for case, kernels in zip(NARROW + WIDE, found, strict=True):
        assert {k.name for k in kernels} == {"layernorm_forward", "layernorm_backward", "rows_sum_partials"}
        for kernel in kernels:
            assert kernel.spill_bytes == 0, (case, kernel)
            # The widest rows take 16 warps a program, the others 8.
            programs = 2 if kernel.name == "layernorm_backward" and case in NARROW else 1
            assert kernel.blocks_per_multiprocessor >= programs, (case, kernel)
    base = {kernel.name: kernel for kernel in found[0]}
    # A row of 768 in one warp: 3 loads of x, 3 of residual and 6 of each float32 parameter; y and s stored in 3 each,
    # mean and rstd in one narrow store each.
    forward = base["layernorm_forward"]
    assert (forward.count_wide("LDG"), forward.count_wide("STG"), forward.count("STG")) == (18, 6, 8)
    # 16 elements of each tensor a thread: every store is wide (dx, dresidual, and the partial sums).
    backward = base["layernorm_backward"]
    assert backward.count_wide("LDG") >= 4
    assert backward.count_wide("STG") == backward.count("STG")


def test_bias_gelu():
    """BERT-base's inner width in bf16: nothing spills, rows move 16 bytes a thread at a time.

    NaN passes through the one minimum that every element takes, which the interpreter cannot show.
    """
    cases = [
        {"arch": arch, "operator": "gelu", "approximate": approximate}
        for arch in (80, 90)
        for approximate in ("none", "tanh")
    ]
    kernels = [kernel for found in compile_kernels(CALL, *cases) for kernel in found]
    assert {k.name for k in kernels} == {"bias_gelu_forward", "bias_gelu_backward", "rows_sum_partials"}
    for kernel in kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.registers <= 64, kernel  # 1024 threads a multiprocessor, or more
        loads, stores, minima = kernel.count_wide("LDG"), kernel.count_wide("STG"), kernel.count("FMNMX.NAN")
        if kernel.name == "bias_gelu_forward":  # 32 elements a thread: 4 loads of x and one of bias
            assert (loads, stores, kernel.count("STG"), minima) == (5, 4, 4, 32)
        if kernel.name == "bias_gelu_backward":  # 16 elements a thread; the partial sums are stored narrower, once
            assert loads >= 4
            assert (stores, minima) == (2, 16)


def test_embed_layernorm():
    """float32 tables, bf16 out, on sm_90: BERT-base's width moves 16 bytes a thread at a time; the widest fits."""
    base, widest = compile_kernels(CALL, *({"arch": 90, "operator": "embed", "H": n} for n in (768, 16384)))
    # What a block may have on the GPUs with the least, sm_86 and sm_120.
    assert all(kernel.shared_bytes <= 99 * 1024 for kernel in (*base, *widest)), (base, widest)
    assert not any(kernel.spill_bytes for kernel in base), base
    by_name = {kernel.name.removeprefix("embed_layernorm_"): kernel for kernel in base}
    assert by_name.keys() == {"forward", "backward", "rows_sum_partials", "sum_runs", "join_runs"}
    # A row of 768 float32 in one warp: 6 loads for each of three tables and two parameters, 3 stores of bf16.
    assert by_name["forward"].count_wide("LDG") == 30
    assert by_name["forward"].count_wide("STG") == 3
    # Two blocks of 8 warps a multiprocessor, which the grid needs.
    assert by_name["backward"].registers <= 128
    assert by_name["backward"].count_wide("LDG") >= 4 * 2
    assert by_name["sum_runs"].count_wide("LDG") == 2
