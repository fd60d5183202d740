"""The masked-LM loss kernels compiled without a GPU: no spills, loads of 16 bytes, the matrix instructions meant."""

import pytest

pytest.importorskip("triton")

from compiled import compile_kernels

from fusebert.bench.compiled.aot import LIMITS, MATRIX

CALL = """
import torch
from fusebert.kernels import masked_lm_loss

def call(rows, hidden_size, dtype="bfloat16", **options):
    hidden, weight = (
        torch.randn(n, hidden_size, dtype=getattr(torch, dtype), requires_grad=True) for n in (rows, 30522)
    )
    bias = torch.zeros(30522, requires_grad=True)
    masked_lm_loss(hidden, weight, bias, torch.zeros(rows, dtype=torch.int64), **options).sum().backward()
"""


def test_chunked_kernels_do_not_spill_and_load_wide():
    cases = [
        {"arch": 90, "rows": 32, "hidden_size": 64, "dtype": dtype, **options}
        for dtype in ("bfloat16", "float32")
        for options in ({}, {"label_smoothing": 0.1, "reduction": "none"})
    ]
    kernels = [kernel for found in compile_kernels(CALL, *cases) for kernel in found]
    assert {k.name for k in kernels} == {"cross_entropy_forward", "cross_entropy_backward", "mlm_chunked_scale"}
    for kernel in kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.registers <= 128, kernel  # 512 threads a multiprocessor, or more
        assert kernel.count("LDG.E.128") >= 2, kernel
        assert kernel.count("STG.E.128") >= 2 or kernel.name == "cross_entropy_forward", kernel


@pytest.mark.parametrize("arch", LIMITS)
def test_lean_kernels_multiply_on_tensor_cores_without_spills(arch):
    """The loads are 16 bytes although 30522 words are no multiple of 8: the contiguous axis is H."""
    (kernels,) = compile_kernels(CALL, {"arch": arch, "rows": 300, "hidden_size": 768, "lean": True})
    assert {k.name for k in kernels} == {"mlm_lean_forward", "mlm_lean_merge", "mlm_lean_backward"}
    for kernel in kernels:
        if kernel.name == "mlm_lean_merge":
            continue
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_bytes <= LIMITS[arch].shared_bytes, kernel
        assert kernel.count(MATRIX[arch]) >= 4, kernel
        assert kernel.count_wide("LDG") >= 16, kernel
        assert kernel.count("STG.E.128") >= 2 or kernel.name == "mlm_lean_forward", kernel
