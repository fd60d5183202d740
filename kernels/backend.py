"""Whether an operator runs its Triton kernels or the PyTorch reference.

``auto`` selects Triton for CUDA tensors of a dtype the kernels support, and the reference otherwise (CPU tensors,
float64, a machine without Triton). ``use_backend`` or the environment variable ``FUSEBERT_BACKEND`` override the
choice, for comparisons and tests; ``triton`` on CPU tensors runs Triton's interpreter. The forward chooses once a call,
and the backward follows it.

Import ``triton`` and ``tl`` from here. Where Triton does not exist (macOS, Windows) they are placeholders, and only the
reference runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .checks import check_choice

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

    class _MissingTriton:
        """Makes kernel files importable without Triton. Launching a kernel fails."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise ModuleNotFoundError(
                "this call needs triton: pip install triton (Linux only), or use backend 'reference'"
            )

        def jit(self, fn: Any = None, **_: Any) -> Any:
            return self if fn is not None else self.jit

        def cdiv(self, a: int, b: int) -> int:
            return -(-a // b)

        def next_power_of_2(self, n: int) -> int:
            return 1 << max(n - 1, 0).bit_length()

    triton = tl = _MissingTriton()  # type: ignore[assignment]

# Read once, as Triton does when it decorates a kernel. torch.compile treats it as a constant.
_INTERPRETING = HAVE_TRITON and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter (``TRITON_INTERPRET=1`` before the first import)."""
    return _INTERPRETING


# Versions that attention's launch tables have been compiled with for sm_90, oldest first; setup.py allows no later one.
VERIFIED_TRITON = ((3, 6), (3, 7), (3, 8), (3, 9))


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the nearest verified Triton. Warns once where the installed one is not verified."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    oldest, newest = VERIFIED_TRITON[0], VERIFIED_TRITON[-1]
    nearest = min(max((major, minor), oldest), newest)
    if nearest != (major, minor):
        warnings.warn(
            f"fusebert is verified with triton {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}, not with "
            f"{triton.__version__}: it launches as with {nearest[0]}.{nearest[1]}, and kernels may be slow",
            stacklevel=2,
        )
    return nearest


BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


_override = os.environ.get("FUSEBERT_BACKEND", "auto")
check_choice("FUSEBERT_BACKEND", _override, BACKENDS)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, run every fusebert operator on ``name``: ``"auto"``, ``"triton"`` or ``"reference"``.

    The setting is process-wide, because autograd runs backwards on its own threads. Two threads cannot use different
    backends.

    Raises:
        ValueError: ``name`` is none of the three.
    """
    global _override
    check_choice("backend", name, BACKENDS)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


@functools.cache
def architecture() -> int:
    """Compute capability of the current GPU, 90 for 9.0. Without a GPU it is 90, Hopper."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def tile_architecture() -> int:
    """The architecture that tiles of matrix products are chosen for, where it decides: 80 on sm_120 and later.

    sm_120 (GeForce, RTX PRO) has neither Hopper's nor Blackwell's matrix instructions, but Ampere's, and 99 KiB of
    shared memory to a block, as sm_86 and sm_89 have: less than sm_80, and all entries for 80 fit it.
    """
    return 80 if architecture() >= 120 else architecture()


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for operands of ``dtype``: TF32 for float32 where torch would use it."""
    # fp32_precision reflects allow_tf32 too. Reading allow_tf32 raises where the program has set fp32_precision.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def in_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Converts as autocast does for matrix products and attention. float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(x.dtype == torch.float64 for x in tensors):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def choose_backend(x: torch.Tensor) -> str:
    """``"triton"`` or ``"reference"`` for an operator with main input ``x``.

    Raises:
        TypeError: ``triton`` is selected and the kernels do not support x's dtype.
        RuntimeError: ``triton`` is selected and cannot run on x's device, or the call is inside a torch.func transform.
    """
    backend = _choose(x)
    if backend == "reference" or torch.compiler.is_compiling():
        return backend
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "the Triton kernels do not run inside torch.vmap, torch.func.grad and the like: call the operator within "
            'use_backend("reference") there'
        )
    return backend


def _choose(x: torch.Tensor) -> str:
    if _override == "reference":
        return "reference"
    if _override == "auto":
        return "triton" if x.is_cuda and HAVE_TRITON and x.dtype in KERNEL_DTYPES else "reference"
    if not HAVE_TRITON:
        raise RuntimeError("backend 'triton' is selected, but triton is not installed: pip install triton (Linux only)")
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"the Triton kernels support bfloat16, float16 and float32; got {x.dtype}")
    if not x.is_cuda and not interpreting():
        raise RuntimeError(
            f"backend 'triton' is selected, but the tensors are on {x.device.type}: move them to a CUDA device, or "
            "set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    return "triton"
