"""Derives attention's launch tables, `attn.config.TABLES` and `MASKED`: ``fusebert bench tune``.

For each head size it compiles the candidate tiles of each kernel and drops those that spill registers or do not fit the
shared memory (with or without dropout). It keeps the fastest on the GPU; without a GPU the first in the order below,
the largest. A segment length takes the short route if its kernel compiles and, on a GPU, is faster than the long route.
If the choice spills under a mask, a window or grouped heads, `MASKED` gets an entry of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from ...kernels import backend
from ...kernels.attn import config as attention_config
from ...kernels.attn.config import Config, Table
from ...kernels.attn.launch import NO_WINDOW, Problem, launch_backward, launch_forward, new_stats
from ...kernels.backend import triton
from . import attention_cases
from .aot import LIMITS, compiled_kernels

HEAD_DIMS = (16, 32, 64, 128, 256)
SHORT_LENGTHS = (16, 32, 64, 128)
LONG_LENGTH = 1024
TOKENS, HEADS = 32768, 12  # of a timed call
DROPOUT_P = 0.1
MOST_REGISTERS = 255  # of a thread. Given as a limit, it stops the assembler from spilling to fit one more block


def _configs(text: str) -> list[Config]:
    return [Config(*map(int, words.split())) for words in text.split(",")]


# Element size → kernel → (BLOCK_M, BLOCK_N, warps, stages), the largest first. float32 products are unrolled FMAs and
# need small tiles.
CANDIDATES: dict[int, dict[str, list[Config]]] = {
    2: {
        "long_forward": _configs(
            "128 128 8 2, 128 64 8 3, 128 64 4 3, 128 64 8 2, 64 64 4 2, 64 32 4 2, 64 32 8 1, 32 32 4 2, 32 32 4 1, "
            "32 16 4 1"
        ),
        "long_backward_dq": _configs("128 64 8 2, 64 64 4 2, 64 32 4 2, 64 32 8 2, 32 32 4 2, 32 32 4 1, 32 16 4 1"),
        "long_backward_dk_dv": _configs(
            "64 128 8 2, 32 128 8 2, 64 64 4 2, 64 64 8 2, 32 64 4 2, 32 64 8 2, 16 64 8 2, 16 64 4 2, 32 32 4 1, "
            "16 32 4 1, 16 16 4 1"
        ),
    },
    4: {
        name: _configs(
            "32 32 4 2, 32 32 8 1, 32 16 4 2, 16 32 4 2, 32 16 8 1, 16 32 8 1, 16 16 4 2, 16 16 4 1, 16 16 8 1"
        )
        for name in ("long_forward", "long_backward_dq", "long_backward_dk_dv")
    },
}


def derive(
    arch: int, dtype: torch.dtype, report: Callable[[str], None], head_dims: Sequence[int] = HEAD_DIMS
) -> tuple[Table, Table]:
    """(table, entries that differ under a mask) for ``sm_<arch>`` and ``dtype``.

    By measurement if this machine has that GPU, otherwise by the compiler. If every candidate of a kernel spills, the
    one that spills least is taken.

    Args:
        report: takes a line for each decision.
    """
    timed = torch.cuda.is_available() and backend.architecture() == arch
    found, masked = (Table({}, {}, {}, {}, {}) for _ in range(2))

    def keep(kernel: str, head_dim: int, best: Any, under_a_mask: Any, words: str) -> None:
        getattr(found, kernel)[head_dim] = best
        if under_a_mask != best:
            getattr(masked, kernel)[head_dim] = under_a_mask
        report(f"{kernel} D={head_dim}: {words}")

    for head_dim in head_dims:
        for kernel, candidates in CANDIDATES[dtype.itemsize].items():
            best, spills = _best(kernel, candidates, head_dim, arch, dtype, timed, False)
            other, more = _best(kernel, [best, *candidates], head_dim, arch, dtype, timed, True)
            words = f"{tuple(best)}" + (f", spills {spills} bytes" if spills else "")
            words += f"; masked {tuple(other)}" + (f", spills {more} bytes" if more else "") if other != best else ""
            keep(kernel, head_dim, best, other, words)
        for kernel in ("short_forward", "short_backward"):
            longest = [0, 0]
            for masked_too in (False, True):
                for length in SHORT_LENGTHS:
                    if spilled_bytes(kernel, None, head_dim, length, arch, dtype, masked_too):
                        break
                    if timed and not _short_is_faster(kernel, head_dim, length, dtype, found):
                        break
                    longest[masked_too] = length
            plain, other_length = longest[0], min(longest)
            keep(kernel, head_dim, plain, other_length, f"up to {plain}; masked {other_length}")
    return found, masked


def _best(
    kernel: str, candidates: list[Config], head_dim: int, arch: int, dtype: torch.dtype, timed: bool, masked: bool
) -> tuple[Config, float]:
    """(configuration, bytes that it spills)."""
    spills: dict[Config, float] = {}
    for candidate in candidates:
        for config in (candidate, candidate._replace(maxnreg=MOST_REGISTERS)):
            spills[config] = spilled_bytes(kernel, config, head_dim, LONG_LENGTH, arch, dtype, masked)
            if spills[config] == 0 and not timed:
                return config, 0
            if not 0 < spills[config] < math.inf:
                break
    least = min(spills.values())
    left = [config for config in spills if spills[config] == least]
    if timed:
        left.sort(key=lambda config: _milliseconds(kernel, config, head_dim, LONG_LENGTH, dtype))
    return left[0], least


def table_for(kernel: str, config: Config | None, head_dim: int) -> Table:
    """A table with which ``kernel`` runs as ``config``; the short ones, without a ``config``, run at any length."""
    longest = {"short_forward": 0, "short_backward": 0} | ({kernel: max(SHORT_LENGTHS)} if config is None else {})
    small = Config(16, 16, 4, 1)
    chosen = {name: {head_dim: config if name == kernel and config else small} for name in CANDIDATES[2]}
    return Table(*({head_dim: n} for n in longest.values()), *chosen.values())  # type: ignore[arg-type]


def _problem(head_dim: int, seqlen: int, tokens: int, heads: int, p: float, dtype: torch.dtype, device: str) -> Problem:
    q, k, v = (torch.randn(tokens, heads, head_dim, dtype=dtype, device=device) for _ in range(3))
    cu_seqlens = torch.arange(0, tokens + 1, seqlen, dtype=torch.int32, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if p else None
    scale = head_dim**-0.5
    return Problem(q, k, v, cu_seqlens, cu_seqlens, None, seed, seqlen, seqlen, scale, p, NO_WINDOW)


def _calls(kernel: str, problem: Problem) -> Callable[[], None]:
    """A call that runs ``kernel`` on ``problem``; for the long backward, both of its kernels."""
    out, stats = torch.zeros_like(problem.q), new_stats(problem.q).zero_()
    if kernel.endswith("forward"):
        return lambda: launch_forward(problem, out, stats)
    dq, dk, dv = (torch.empty_like(out) for _ in range(3))
    return lambda: launch_backward(problem, out, stats, out, dq, dk, dv)


def _variants(kernel: str, masked: bool) -> tuple[attention_cases.Variant, ...]:
    if not masked:
        return attention_cases.DROPOUT, attention_cases.PLAIN
    heads = attention_cases.GROUPED if kernel.startswith("long") else attention_cases.MASKED
    return heads, attention_cases.WINDOW


def spilled_bytes(
    kernel: str, config: Config | None, head_dim: int, seqlen: int, arch: int, dtype: torch.dtype, masked: bool
) -> float:
    """Bytes of registers that ``kernel`` spills, the worst of its variants; infinite if it does not fit."""
    worst = 0.0
    for variant in _variants(kernel, masked):
        with (
            compiled_kernels(arch) as found,
            mock.patch.object(attention_config, "table", return_value=table_for(kernel, config, head_dim)),
        ):
            attention_cases.call(dtype, head_dim, seqlen, seqlen, variant)
        r = next(r for r in found if r.name == f"attn_{kernel}")
        worst = max(worst, r.spill_bytes if r.shared_bytes <= LIMITS[arch][2] else math.inf)
        if worst:
            break
    return worst


def _milliseconds(kernel: str, config: Config | None, head_dim: int, seqlen: int, dtype: torch.dtype) -> float:
    with mock.patch.object(attention_config, "table", return_value=table_for(kernel, config, head_dim)):
        call = _calls(kernel, _problem(head_dim, seqlen, TOKENS, HEADS, DROPOUT_P, dtype, "cuda"))
        return float(triton.testing.do_bench(call, return_mode="median"))


def _short_is_faster(kernel: str, head_dim: int, seqlen: int, dtype: torch.dtype, table: Table) -> bool:
    long_only = table._replace(short_forward={head_dim: 0}, short_backward={head_dim: 0})
    call = _calls(kernel, _problem(head_dim, seqlen, TOKENS, HEADS, DROPOUT_P, dtype, "cuda"))
    with mock.patch.object(attention_config, "table", return_value=long_only):
        long = float(triton.testing.do_bench(call, return_mode="median"))
    return _milliseconds(kernel, None, head_dim, seqlen, dtype) < long


def as_code(arch: int, dtype: torch.dtype, table: Table) -> str:
    """The entry for ``attention_config.TABLES`` or ``MASKED``, as Python."""
    lines = [f"    ({arch}, {dtype.itemsize}): Table("]
    for name, values in table._asdict().items():
        if name.startswith("short") or not values:
            lines.append(f"        {name}={values},")
        else:
            lines.append(f"        {name}={{")
            for head_dim, config in values.items():
                arguments = [*map(str, config[:4]), *([f"maxnreg={config.maxnreg}"] if config.maxnreg else [])]
                lines.append(f"            {head_dim}: Config({', '.join(arguments)}),")
            lines.append("        },")
    return "\n".join([*lines, "    ),"])
