"""The rule of `fusebert.bench.measure.correctness` as an assertion; the device and dtypes of the tests."""

from __future__ import annotations

import torch

from fusebert.bench.measure.correctness import RIGHT_FACTOR, allowance, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Kernels with tl.dot are tested in bf16 on a GPU only: the interpreter multiplies bit patterns (triton #11584).
DOT_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_as_good_as_torch(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    torch_result: torch.Tensor,
    name: str = "out",
    cancelled: float = 0.0,
    roundings: int = 1,
) -> None:
    """``actual`` is as close to ``oracle`` as twice PyTorch's own result at the same dtype.

    Args:
        cancelled: where the oracle is exactly zero, the norm of the terms that cancel; their rounding remains.
        roundings: as in `allowance`.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == torch_result.dtype, f"{name}: dtype {actual.dtype}, expected {torch_result.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if oracle.double().norm() == 0:
        allowed = RIGHT_FACTOR * roundings * torch.finfo(actual.dtype).eps / 2 * cancelled
        norm = actual.double().norm().item()
        assert norm <= allowed, f"{name}: expected zeros; norm {norm:.3g}, allowed {allowed:.3g}"
        return
    allowed = RIGHT_FACTOR * allowance(torch_result, oracle, roundings=roundings)
    error = relative_error(actual, oracle)
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
