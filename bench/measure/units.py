"""Figures in words: times, bytes, rates, ratios with their interval."""

from __future__ import annotations

from typing import Any


def milliseconds(ms: float) -> str:
    """A time, in µs below 0.1 ms."""
    return f"{ms:.3f} ms" if ms >= 0.1 else f"{1e3 * ms:.1f} µs"


def size(n: float) -> str:
    """Bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def rate(limit: str, row: dict[str, Any]) -> str:
    """A contestant's rate in the unit of what limits the operator, "matmul" or "memory"."""
    if limit == "matmul":
        return f"{row['flops_per_s'] / 1e12:.4g} TFLOP/s"
    return f"{row['bytes_per_s'] / 1e9:.4g} GB/s"


def interval(against: dict[str, float] | None) -> str:
    """A ratio and its 95 % interval; nothing where there is none."""
    return "" if against is None else f"{against['median']:.2f} [{against['low']:.2f}, {against['high']:.2f}]"
