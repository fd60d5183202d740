"""Which implementation an operator runs: the Triton kernel or the plain PyTorch reference.

``auto`` takes Triton for CUDA tensors of a dtype the kernels support and the reference for everything else (CPU
tensors, float64, a machine without Triton). ``use_backend`` or the environment variable ``FUSEBERT_BACKEND``
override the choice, for comparisons and for tests: ``triton`` on CPU tensors runs Triton's interpreter.
The choice is made once a call, in the forward; the backward follows it.

``triton`` and ``tl`` are imported from here: where Triton does not exist (macOS, Windows) they are stand-ins, and only
the reference runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
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
        """Lets kernel files be imported without Triton; launching a kernel is what fails."""

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

# Read once, as Triton itself does where it decorates a kernel; a constant to torch.compile.
_INTERPRETING = HAVE_TRITON and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """True when kernels run in Triton's CPU interpreter (``TRITON_INTERPRET=1`` before the first import)."""
    return _INTERPRETING


BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


_override = os.environ.get("FUSEBERT_BACKEND", "auto")
check_choice("FUSEBERT_BACKEND", _override, BACKENDS)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, run every fusebert operator on ``name``: ``"auto"``, ``"triton"`` or ``"reference"``.

    Process-wide (autograd runs backwards on threads of its own), so not for two threads that want different ones.

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
    """Compute capability of the current GPU, 90 for 9.0; where there is none, Hopper's."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for operands of ``dtype``: float32 is multiplied in TF32 where torch would."""
    # Not allow_tf32: reading that raises where the program has set fp32_precision, which follows either.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def choose_backend(x: torch.Tensor) -> str:
    """``"triton"`` or ``"reference"`` for an operator whose main input is ``x``.

    Raises:
        TypeError: ``triton`` was asked for and ``x`` has a dtype the kernels do not take.
        RuntimeError: ``triton`` was asked for and cannot run where ``x`` is; or inside a torch.func transform.
    """
    backend = _choose(x)
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if backend == "triton" and transformed:
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
        raise RuntimeError(
            "backend 'triton' was asked for, but triton is not installed (pip install triton, Linux only)"
        )
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"the Triton kernels take bfloat16, float16 and float32; got {x.dtype}")
    if not x.is_cuda and not interpreting():
        raise RuntimeError(
            f"backend 'triton' was asked for, but the tensors are on {x.device.type}: move them to a CUDA device, or "
            "set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    return "triton"
