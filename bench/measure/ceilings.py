"""The machine's ceilings, measured in the same run as the contestants: copy rate and matrix-product rate.

copy     b ← a, a of 1 GiB: bytes read + bytes written over time
matmul   C ← A B, 8192³ on random data (`train.step.flops.matmul_rate`, MFU's denominator): 2 M N K FLOPs over time
linears  BERT-base's own products, forward and both gradients; at K = 768 their rate is lower than the large product's
"""

from __future__ import annotations

import dataclasses
from dataclasses import field

import torch

from ...train.step.flops import matmul_rate
from .serialise import OPTIONAL
from .statistics import Timing
from .timing import Work, interleave

# (in features, out features) of BERT-base's linears.
BERT_BASE_LINEARS = {"qkv": (768, 2304), "attention output": (768, 768), "ffn in": (768, 3072), "ffn out": (3072, 768)}


@dataclasses.dataclass(frozen=True)
class LinearRates:
    """FLOPs a second of BERT-base's linears over ``tokens`` rows: linear → product → rate."""

    tokens: int
    flops_per_s: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The machine's measured rates. ``dtype``: of the matrix products."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    dtype: str
    bert_base_linears: LinearRates | None = field(default=None, metadata=OPTIONAL)


@dataclasses.dataclass(frozen=True)
class Drift:
    """Rates after a run over those before it. Below 1 the machine became slower during the run."""

    copy: float
    matmul: float


def _median(work: Work, device: torch.device, seconds: float) -> Timing:
    return interleave({"": work}, device, seconds=seconds, min_rounds=5, device_time=True)[""]


def copy_rate(device: torch.device, *, seconds: float = 0.5) -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    a = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    timing = _median(Work(lambda _: b.copy_(a)), device, seconds)
    return 2 * size / (1e-3 * timing.median_ms)


def linear_rates(
    device: torch.device, dtype: torch.dtype, *, tokens: int, seconds: float = 0.2
) -> dict[str, dict[str, float]]:
    """FLOPs a second of BERT-base's linears over ``tokens`` rows: forward, gradient of the input, of the weight."""
    rates: dict[str, dict[str, float]] = {}
    for name, (n_in, n_out) in BERT_BASE_LINEARS.items():
        x, dy = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (n_in, n_out))
        w = torch.randn(n_out, n_in, device=device, dtype=dtype)
        works = {
            "forward": Work(lambda _, x=x, w=w: x @ w.t()),
            "input gradient": Work(lambda _, dy=dy, w=w: dy @ w),
            "weight gradient": Work(lambda _, dy=dy, x=x: dy.t() @ x),
        }
        timings = interleave(works, device, seconds=seconds, min_rounds=3, device_time=True)
        flops = 2 * tokens * n_in * n_out
        rates[name] = {which: flops / (1e-3 * timing.median_ms) for which, timing in timings.items()}
    return rates


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """All of the above; ``quick`` leaves out the linears and measures for less long."""
    seconds = 0.1 if quick else 0.5
    linears = None
    copy, matmul = copy_rate(device, seconds=seconds), matmul_rate(device, dtype, seconds=seconds)
    if not quick and device.type == "cuda":
        tokens = 65536
        linears = LinearRates(tokens, linear_rates(device, dtype, tokens=tokens))
    return Ceilings(copy, matmul, str(dtype).removeprefix("torch."), linears)


def measure_drift(before: Ceilings, device: torch.device, dtype: torch.dtype) -> Drift:
    """Both rates now over those of ``before``."""
    return Drift(
        copy=copy_rate(device, seconds=0.1) / before.copy_bytes_per_s,
        matmul=matmul_rate(device, dtype, seconds=0.1) / before.matmul_flops_per_s,
    )
