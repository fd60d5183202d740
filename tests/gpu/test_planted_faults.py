"""`make gpu-check` sees faults: a missing mask, a wrong stride, a race and unwritten memory, in each operator.

A fault is planted in a copy of one kernel. ttsem names accesses outside the tensors and races; the comparison with the
reference sees the rest, because memory is NaN until it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from attention_cases import SEED, lengths_to_cu, randn, use_long_route
from gpu_check import ON_CPU
from torch import Tensor

from fusebert.kernels import (
    attention_varlen,
    bias_gelu,
    dropout_add_layernorm,
    embed_layernorm,
    gelu,
    masked_lm_loss,
    rmsnorm,
    use_backend,
)
from fusebert.kernels.attn import launch as attention_launch
from fusebert.kernels.backend import triton
from fusebert.kernels.embedding import launch as embedding_launch
from fusebert.kernels.mlm import softmax_rows
from fusebert.kernels.norm import launch as norm_launch

pytestmark = pytest.mark.skipif(not ON_CPU, reason="these kernels leave their tensors: only for `make gpu-check`")

OUTSIDE, UNDEFINED, RACE = {"oob_read", "oob_write"}, {"poison"}, {"race"}  # the kinds of ttsem.sanitize.Fault
NOT_FINITE, DIFFERS = {"not finite"}, {"differs"}


def strided(rows: int, columns: int) -> Tensor:
    return randn(rows, columns + 8)[:, :columns]


def attention_inputs() -> list[Tensor]:
    return [randn(30, 3, 2, 24, dtype=torch.bfloat16)]


def attention(qkv: Tensor) -> Tensor:
    cu = lengths_to_cu([17, 13])
    return attention_varlen(qkv, cu, 17)


def layernorm_inputs() -> list[Tensor]:
    return [strided(100, 48), randn(100, 48), randn(48), randn(48)]


def embedding_inputs() -> list[Tensor]:
    return [randn(rows, 48) for rows in (19, 2, 40)] + [randn(48), randn(48)]


def embedding(*tables: Tensor) -> Tensor:
    ids = torch.arange(40, device=tables[0].device)
    return embed_layernorm((18 - ids) % 19, ids % 2, ids, *tables, eps=1e-5)


def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    labels = torch.arange(9, device=hidden.device)
    return masked_lm_loss(hidden, weight, bias, labels, lean=False)


# (inputs, operator) by name; the long route is chosen by the test.
OPERATORS: dict[str, tuple[Callable[[], list[Tensor]], Callable[..., Tensor]]] = {
    "attention, short": (attention_inputs, attention),
    "attention, long": (attention_inputs, attention),
    "layernorm": (layernorm_inputs, lambda *x: dropout_add_layernorm(*x, p=0.0, seed=SEED)),
    "rmsnorm": (lambda: [strided(100, 48), randn(48)], rmsnorm),
    "embed_layernorm": (embedding_inputs, embedding),
    "bias_gelu": (lambda: [strided(150, 40), randn(40)], bias_gelu),
    "masked_lm_loss": (lambda: [randn(9, 16), randn(37, 16), randn(37)], loss),
}


class Fault(NamedTuple):
    operator: str
    name: str
    module: ModuleType  # that launches the kernel
    kernel: str
    right: str  # text of the kernel
    wrong: str
    seen_as: set[str]


NORM_MASK = (
    "tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
    "tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask | True)",
)
NORM_STRIDE = ("row_tile(tile, stride_x,", "row_tile(tile, None,")
NORM_RSTD = (
    "tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)",
    "tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows - 1)",
)
PARTIAL = ("partial = tl.program_id(0) * H + columns", "partial = columns")
A, N, E = attention_launch, norm_launch, embedding_launch
FAULTS = [
    # Attention, short: the last row of K, the row stride of qkv for out, two heads in one place, no statistics.
    Fault("attention, short", "mask", A, "attn_short_forward",
          "head, 0, n_q, BLOCK_M, D, BLOCK_D)\n    log2_l", "head, 0, n_q + 9, BLOCK_M, D, BLOCK_D)\n    log2_l",
          OUTSIDE | UNDEFINED),
    Fault("attention, short", "mask of a load", A, "attn_short_backward",
          "q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q,",
          "q = load_tile(q_ptr, q_strides, q_origin, head, 0, n_q + 9,", OUTSIDE),
    Fault("attention, short", "stride", A, "attn_short_forward",
          "store_tile(out_ptr, out, out_strides,", "store_tile(out_ptr, out, q_strides,", OUTSIDE),
    Fault("attention, short", "race", A, "attn_short_forward",
          "store_tile(out_ptr, out, out_strides, q_origin, head,",
          "store_tile(out_ptr, out, out_strides, q_origin, head // 2,", RACE),
    Fault("attention, short", "race in the backward", A, "attn_short_backward",
          "dk_strides, k_origin, head,", "dk_strides, k_origin, head // 2,", RACE),
    Fault("attention, short", "unwritten", A, "attn_short_forward",
          "store_statistics(stats_ptr, m, log2_l, stats_strides, q_origin, head, rows, n_q)",
          "store_statistics(stats_ptr, m, log2_l, stats_strides, q_origin, head, rows, n_q - 1)", NOT_FINITE),
    Fault("attention, long", "mask", A, "attn_long_backward_dq",
          "q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q,",
          "q = load_tile(q_ptr, q_strides, q_origin, head, start_m, n_q + 9,", OUTSIDE),
    Fault("attention, long", "stride", A, "attn_long_forward",
          "store_tile(out_ptr, out, out_strides,", "store_tile(out_ptr, out, q_strides,", OUTSIDE),
    Fault("attention, long", "race", A, "attn_long_forward",
          "store_tile(out_ptr, out, out_strides, q_origin, head,",
          "store_tile(out_ptr, out, out_strides, q_origin, head // 2,", RACE),
    Fault("attention, long", "unwritten", A, "attn_long_forward",
          "stats_strides, q_origin, head, rows, n_q)", "stats_strides, q_origin, head, rows, n_q - 1)", NOT_FINITE),
    *(
        fault
        for operator in ("layernorm", "rmsnorm")
        for fault in (
            Fault(operator, "mask", N, "layernorm_forward", *NORM_MASK, OUTSIDE | UNDEFINED),
            Fault(operator, "stride", N, "layernorm_forward", *NORM_STRIDE, DIFFERS),
            Fault(operator, "race", N, "layernorm_backward", *PARTIAL, RACE),
            Fault(operator, "unwritten", N, "layernorm_forward", *NORM_RSTD, NOT_FINITE),
        )
    ),
    Fault("embed_layernorm", "mask", E, "embed_layernorm_forward", *NORM_MASK, OUTSIDE | UNDEFINED),
    Fault("embed_layernorm", "stride", E, "embed_layernorm_forward",
          "gather_rows(word_ptr, words, mask, H, BLOCK_H)", "gather_rows(word_ptr, words, mask, H + 1, BLOCK_H)",
          OUTSIDE),
    Fault("embed_layernorm", "race", E, "embed_layernorm_backward", *PARTIAL, RACE),
    Fault("embed_layernorm", "unwritten", E, "embed_layernorm_forward", *NORM_RSTD, NOT_FINITE),
    Fault("bias_gelu", "mask", gelu, "bias_gelu_forward", "element_ty), mask=mask)", "element_ty))",
          OUTSIDE | UNDEFINED),
    Fault("bias_gelu", "stride", gelu, "bias_gelu_forward", "tile_i, stride_x,", "tile_i, None,", DIFFERS),
    Fault("bias_gelu", "race", gelu, "bias_gelu_backward", "program * I + columns", "columns", RACE),
    Fault("bias_gelu", "unwritten", gelu, "bias_gelu_backward",
          "tl.sum(dbias, axis=0), mask=columns < I)", "tl.sum(dbias, axis=0), mask=columns < I - 1)", NOT_FINITE),
    Fault("masked_lm_loss", "mask", softmax_rows, "cross_entropy_backward",
          "mask=(rows < num_rows)[:, None] & exists[None, :])", "mask=exists[None, :])", OUTSIDE),
    Fault("masked_lm_loss", "stride", softmax_rows, "cross_entropy_forward",
          "tl.cast(row, tl.int64) * stride_m", "tl.cast(row, tl.int64) * vocab_size", DIFFERS),
    Fault("masked_lm_loss", "race", softmax_rows, "cross_entropy_forward",
          "tl.store(loss_ptr + row, loss)", "tl.store(loss_ptr + row // 2, loss)", RACE),
    Fault("masked_lm_loss", "unwritten", softmax_rows, "cross_entropy_forward",
          "tl.store(sum_ptr + row, row_sum)", "tl.store(sum_ptr + row, row_sum, mask=row > 0)", NOT_FINITE),
]  # fmt: skip


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: Fault) -> None:
    """The launcher's kernel becomes a copy with the fault in it."""
    kernel = getattr(fault.module, fault.kernel)
    assert kernel.src.count(fault.right) == 1, f"{fault.kernel} has no longer exactly one {fault.right!r}"
    path = folder / f"{fault.kernel}.py"  # Triton reads a kernel's text from its file
    path.write_text(kernel.src.replace(fault.right, fault.wrong))
    namespace = dict(kernel.fn.__globals__)
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    copy = triton.jit(namespace[fault.kernel], do_not_specialize=kernel.do_not_specialize)
    monkeypatch.setattr(fault.module, fault.kernel, copy)


def verdict(operator: str) -> str:
    """What the check says: a kind of fault that ttsem names, "not finite", "differs", or "right"."""
    make, call = OPERATORS[operator]
    inputs = make()
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", None)):
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
        try:
            with use_backend(backend):
                out = call(*leaves)
                gradients = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out).to(out))
        except Exception as error:
            # The program is __main__ and not the module ttsem.sanitize, which has this class.
            if type(error).__name__ != "KernelFault":
                raise
            return error.fault.kind
        results.append([out.detach(), *gradients])
    for expected, found in zip(*results, strict=True):
        if not found.isfinite().all():
            return "not finite"
        if (found - expected).norm() > 0.02 * expected.norm():
            return "differs"
    return "right"


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_planted_nothing_found(operator, monkeypatch):
    if operator == "attention, long":
        use_long_route(monkeypatch)
    assert verdict(operator) == "right"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.operator}: {f.name}")
def test_a_planted_fault_is_seen(fault, monkeypatch, tmp_path):
    if fault.operator == "attention, long":
        use_long_route(monkeypatch)
    plant(monkeypatch, tmp_path, fault)
    assert verdict(fault.operator) in fault.seen_as
