"""Every way in which attention can be launched, as calls to compile, enumerated from the launch tables.

A launch is an entry of `attn.config.TABLES` (element size, BLOCK_D, and a segment length of the short route or the
tiles of the long route) under a `Variant`: dropout, a window, a padding mask, grouped heads. A few cases stand for the
rest: head sizes below BLOCK_D and the scheduled grid (`_between`), unequal lengths of queries and keys, and fp16, which
differs from bf16 in its conversions only. Padded tensors without a mask compile as packed ones without cu_seqlens.

``heaviest`` takes one variant an entry, which the tests have time to compile. For the others the tests read the
committed table, provided that it was made of these `sources`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from ...kernels import backend
from ...kernels.attn import config as attention_config
from ...kernels.attn.config import Table
from ...kernels.attn.launch import NO_WINDOW, Problem, launch_backward, launch_forward, new_output, new_stats
from .aot import LIMITS, MATRIX, Resources

LONG = 512  # tokens of a segment: more than a tile of any table holds
HEADS = 4
MATRIX_ROWS = 64  # of the left factor, for Hopper's and Blackwell's matrix instructions; fewer rows take Ampere's

# Files of attention that do not decide what is compiled.
NOT_COMPILED = ("__init__", "api", "op", "torch_path")


def _code_words(node: ast.AST) -> Iterator[str]:
    """The code without comments, docstrings and messages (f-strings): the same words in every version of Python."""
    yield type(node).__name__
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            docstring = isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
            if isinstance(item, ast.AST) and not docstring and not isinstance(item, ast.JoinedStr):
                yield from _code_words(item)
            elif isinstance(item, (str, int, float)):
                yield repr(item)


def sources() -> str:
    """A digest of attention's kernels, tables and launcher: other sources may compile to something else."""
    folder = Path(attention_config.__file__).parent
    compiled = [path for path in sorted(folder.glob("*.py")) if path.stem not in NOT_COMPILED]
    files = [folder.parent / "dropout.py", *compiled]
    words = "\n".join(word for file in files for word in _code_words(ast.parse(file.read_text(encoding="utf-8"))))
    return hashlib.sha256(words.encode()).hexdigest()


class Variant(NamedTuple):
    """What decides, besides the shape, which code is compiled.

    Attributes:
        form: "packed"; "masked": a padded batch with its mask; "scheduled": packed, and few tiles of the grid exist.
        groups: query heads for each key head.
    """

    form: str = "packed"
    window: bool = False
    dropout: bool = False
    groups: int = 1
    tf32: bool = False

    def __str__(self) -> str:
        parts = [self.form, *(name for name in ("window", "dropout", "tf32") if getattr(self, name))]
        return " ".join([*parts, f"groups={self.groups}"] if self.groups > 1 else parts)


PLAIN = Variant()
DROPOUT = Variant(dropout=True)
WINDOW = Variant(window=True, dropout=True)
MASKED = Variant("masked", window=True, dropout=True)
GROUPED = MASKED._replace(groups=2)
SCHEDULED = Variant("scheduled", dropout=True)


def call(dtype: torch.dtype, head_dim: int, n_q: int, n_k: int, variant: Variant) -> None:
    """Forward and backward as the launcher chooses them, on uninitialised tensors."""
    heads, key_heads = HEADS, HEADS // variant.groups
    cu_q = cu_k = mask = None
    longest_q, longest_k = n_q, n_k
    if variant.form == "scheduled":  # `schedule.choose_grid`: max_seqlen is far more than these lengths
        longest_q, longest_k = 64 * n_q, 64 * n_k
    if variant.form != "masked":
        q = torch.empty(2 * n_q, heads, head_dim, dtype=dtype)
        k, v = (torch.empty(2 * n_k, key_heads, head_dim, dtype=dtype) for _ in range(2))
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (n_q, n_k))
    else:
        q = torch.empty(2, heads, n_q, head_dim, dtype=dtype)
        k, v = (torch.empty(2, key_heads, n_k, head_dim, dtype=dtype) for _ in range(2))
        mask = torch.ones(2, n_k, dtype=torch.uint8)
    seed = torch.zeros(1, dtype=torch.int64) if variant.dropout else None
    window, p = 5 if variant.window else NO_WINDOW, 0.1 if variant.dropout else 0.0
    problem = Problem(q, k, v, cu_q, cu_k, mask, seed, longest_q, longest_k, head_dim**-0.5, p, window)
    out, stats = new_output(q), new_stats(q)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if variant.tf32 else "ieee"
    try:
        launch_forward(problem, out, stats)
        launch_backward(problem, out, stats, out, new_output(q), new_output(k), new_output(v))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def tables(arch: int, dtype: torch.dtype) -> tuple[Table, Table]:
    """The tables of plain calls and of masked ones."""
    with mock.patch.object(backend, "architecture", return_value=arch):
        return attention_config.table(dtype), attention_config.table(dtype, masked=True)


def _longest(table: Table, head_dim: int) -> list[int]:
    """The longest segments that a short kernel takes whole."""
    return sorted({table.short_forward[head_dim], table.short_backward[head_dim]} - {0})


def _table_entries(
    arch: int, dtype: torch.dtype, heaviest: bool
) -> Iterator[tuple[torch.dtype, int, int, int, Variant]]:
    plain, masked = tables(arch, dtype)
    for head_dim in plain.long_forward:
        for n in _longest(masked, head_dim):
            for variant in (WINDOW,) if heaviest else (WINDOW, MASKED, DROPOUT, PLAIN):
                yield dtype, head_dim, n, n, variant
        if _longest(plain, head_dim) != _longest(masked, head_dim):
            for n in _longest(plain, head_dim):
                if heaviest or n not in _longest(masked, head_dim):
                    yield dtype, head_dim, n, n, DROPOUT
        for n in (32,) if heaviest else (16, 32, 64):  # with 32 rows a warp holds most: `short_config`
            if n < max(_longest(plain, head_dim), default=0) and n not in _longest(masked, head_dim):
                yield dtype, head_dim, n, n, WINDOW
        own = any(getattr(plain, name)[head_dim] != getattr(masked, name)[head_dim] for name in Table._fields)
        for variant in (GROUPED, *([DROPOUT] if own else [])) if heaviest else (GROUPED, WINDOW, DROPOUT, PLAIN):
            yield dtype, head_dim, LONG, LONG, variant
        if dtype == torch.float32 and not heaviest:
            yield dtype, head_dim, LONG, LONG, GROUPED._replace(tf32=True)


def _between() -> Iterator[tuple[torch.dtype, int, int, int, Variant]]:
    """Head sizes between two entries, and the scheduled grid."""
    for head_dim in (48, 80, 96):
        yield torch.bfloat16, head_dim, 128, 128, WINDOW
    for head_dim in (48, 64, 80, 96, 128):
        yield torch.bfloat16, head_dim, LONG, LONG, SCHEDULED


def _bert_head() -> Iterator[tuple[torch.dtype, int, int, int, Variant]]:
    """BERT's D = 64: what `_table_entries` leaves out."""
    for n in (16, 64, 128, LONG):
        yield torch.float16, 64, n, n, WINDOW
        yield torch.bfloat16, 64, n, n, DROPOUT
    yield torch.bfloat16, 64, 16, 128, WINDOW
    yield torch.bfloat16, 64, 128, 16, WINDOW


def cases(arch: int, *, heaviest: bool = False) -> dict[str, Callable[[], None]]:
    """Name → a call to make within `compiled_kernels`."""
    found = [case for dtype in (torch.bfloat16, torch.float32) for case in _table_entries(arch, dtype, heaviest)]
    found += _between()
    if not heaviest:
        found += _bert_head()
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return {
        f"attention {names[dtype]} D={d} N={n if n == m else f'{n}x{m}'} {variant}": functools.partial(
            call, dtype, d, n, m, variant
        )
        for dtype, d, n, m, variant in found
    }


def problems(r: Resources) -> list[str]:
    """What is wrong with a compiled kernel of attention, in words; nothing for the kernel that schedules tiles."""
    constants = r.constants
    if not r.name.startswith(("attn_short", "attn_long")):
        return []
    found = []
    if r.spill_bytes:
        found.append(f"spills {r.spill_bytes} bytes")
    limit = LIMITS[r.arch].shared_bytes
    if r.shared_bytes > limit:
        found.append(f"takes {r.shared_bytes} bytes of shared memory; there are {limit}")
    # The rows of a product's left factor: queries for S and dQ, keys for dK and dV, both in the short backward.
    rows = {"attn_short_backward": max(constants["BLOCK_M"], constants["BLOCK_N"])}
    rows |= {"attn_long_backward_dk_dv": constants["BLOCK_N"]}
    if constants["FP32"] and constants["PRECISION"] == "ieee":
        meant = None
    else:
        meant = MATRIX[r.arch] if rows.get(r.name, constants["BLOCK_M"]) >= MATRIX_ROWS else "HMMA"
    if r.matrix_instruction != meant:
        found.append(f"multiplies with {r.matrix_instruction}, not {meant}")
    return found
