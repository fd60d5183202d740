"""The chunked mode of `masked_lm_loss`: chunks within the memory budget, one tensor of logits, operators."""

from __future__ import annotations

import pytest
import torch
from mlm_cases import IGNORE, allocations, compare, gradients, peak_bytes, problem, reproducible_triton  # noqa: F401
from oracle import DEVICE, DTYPES, relative_error

import fusebert.kernels.mlm.chunked as module
from fusebert.kernels import masked_lm_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks_change_nothing(reduction, dtype, monkeypatch):
    *inputs, labels = problem(19, 40, dtype, ignored=(2, 7, 8, 9))
    whole = masked_lm_loss(*inputs, labels, reduction=reduction, return_accuracy=True)
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    monkeypatch.setattr(module, "CHUNK_TILE", 8)
    launched = []
    launch = module.launch_statistics
    monkeypatch.setattr(module, "launch_statistics", lambda *a: launched.append(a[0].shape) or launch(*a))
    chunked = masked_lm_loss(*inputs, labels, reduction=reduction, return_accuracy=True)
    assert launched == [(8, 40), (8, 40), (3, 40)]
    assert relative_error(chunked[0], whole[0]) < 1e-6
    assert chunked[1].item() == whole[1].item()
    compare(inputs, labels, reduction)


def test_chunks_are_equal_parts_in_tiles_within_the_budget():
    for rows, width, size in (
        (9830, 30528, 2),
        (9830, 131072, 2),
        (9830, 262144, 2),
        (100_000, 30528, 4),
        (5, 10**8, 4),
    ):
        chunk = module.chunk_rows(rows, width, size)
        assert chunk * width * size <= module.LOGITS_BYTES or chunk <= 128
        assert chunk == rows or chunk % 128 == 0
        assert -(-rows // chunk) * chunk - rows < 128 * -(-rows // chunk)
    assert module.chunk_rows(9830, 30528, 2) == 9830


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_exist_in_their_own_dtype_only(reduction):
    """Forward and backward together allocate one [rows, vocab] tensor, in bf16; for "none" one each."""
    rows, vocab_size = 40, 2048
    *inputs, labels = problem(rows, vocab_size, torch.bfloat16, hidden_size=4)

    def call():
        gradients(lambda *x: masked_lm_loss(*x, reduction=reduction), inputs, labels, 1.0)

    logits = 2 * rows * vocab_size
    if DEVICE == "cpu":
        *small, largest = sorted(allocations(call))
        assert largest == logits
        assert (small[-1] == logits) == (reduction == "none")
    else:
        assert logits <= peak_bytes(call) < 2 * logits


def test_no_gradient_work_without_a_gradient(monkeypatch):
    *inputs, labels = problem(5, 30)
    monkeypatch.setattr(module, "launch_gradient", lambda *_, **__: pytest.fail("a gradient was computed"))
    masked_lm_loss(*inputs, labels)
    with torch.no_grad():
        masked_lm_loss(*(x.detach().requires_grad_() for x in inputs), labels)


@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck(per_row):
    *inputs, labels = problem(6, 20)
    arguments = (*inputs, labels, None, IGNORE, 0.1, 1e-3, per_row, *[not per_row] * 3)
    torch.library.opcheck(torch.ops.fusebert.linear_cross_entropy.default, arguments)
    arguments = (torch.randn(6, 20, device=DEVICE), torch.tensor(2.0, device=DEVICE), 0.5)
    torch.library.opcheck(torch.ops.fusebert.scale.default, arguments)
