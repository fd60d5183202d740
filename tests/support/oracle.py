"""The tolerance of every kernel test: at most twice the error that PyTorch makes at the same dtype, against float64."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Kernels with tl.dot are tested in bf16 on a GPU only: the interpreter multiplies bit patterns (triton #11584).
DOT_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def relative_error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64; NaN anywhere gives NaN."""
    actual, oracle = actual.detach().double().cpu(), oracle.detach().double().cpu()
    return ((actual - oracle).norm() / oracle.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_as_good_as_torch(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    torch_result: torch.Tensor,
    name: str = "out",
    factor: float = 2.0,
    cancelled: float = 0.0,
    roundings: int = 1,
) -> None:
    """``actual`` is as close to ``oracle`` as ``factor`` times PyTorch's own result at the same dtype.

    Where PyTorch happens to be nearer than its dtype can express, ``roundings`` of every element set the bound: one, or
    as many as the computation makes in a row, for shapes so small that PyTorch's own error is chance.
    ``cancelled``: where the oracle is exactly zero, the norm of the terms that cancel, whose rounding remains.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == torch_result.dtype, f"{name}: dtype {actual.dtype}, expected {torch_result.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    unit_roundoff = roundings * torch.finfo(actual.dtype).eps / 2
    if oracle.double().norm() == 0:
        norm, allowed = actual.double().norm().item(), factor * unit_roundoff * cancelled
        assert norm <= allowed, f"{name}: expected zeros; norm {norm:.3g}, allowed {allowed:.3g}"
        return
    allowed = factor * max(relative_error(torch_result, oracle), unit_roundoff)
    error = relative_error(actual, oracle)
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
