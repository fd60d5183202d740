"""Makes Triton's interpreter treat bfloat16 as GPUs do.

The interpreter converts float32 to bfloat16 by truncation, where GPUs round to nearest, ties to even. Its tl.dot
multiplies bfloat16 operands as integers.
"""

from __future__ import annotations

import numpy as np


def round_bfloat16(monkeypatch) -> None:
    """Round to nearest within one test, so that error bounds for bfloat16 hold."""
    import triton.language as tl
    from triton.runtime import interpreter

    def convert(data, source, target, rounding_mode):
        if source != tl.float32 or target != tl.bfloat16:
            return original(data, source, target, rounding_mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    original = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)


def multiply_bfloat16(monkeypatch) -> None:
    """Make tl.dot multiply bfloat16 numbers within one test, not their bit patterns (triton #11584)."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return original(self, widen(a), widen(b), *rest)

    original = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
