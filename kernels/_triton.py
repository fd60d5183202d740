"""``triton`` and ``tl``, or stand-ins where Triton does not exist (macOS, Windows): there only the reference runs."""

from __future__ import annotations

from typing import Any

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


__all__ = ["HAVE_TRITON", "interpreting", "tl", "triton"]
