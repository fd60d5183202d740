"""Memory of `masked_lm_loss` on the reference path: logits of labelled rows only, in chunks within the budget."""

from __future__ import annotations

import pytest
import torch
from mlm_cases import IGNORE, allocations, gradients, peak_bytes, problem
from oracle import DEVICE, relative_error

import fusebert.kernels.mlm.api as public
import fusebert.kernels.mlm.chunked as module
from fusebert.kernels import masked_lm_loss, use_backend

TOKENS, MASKED, VOCAB = 400, 60, 262144
# Allocated at once for a row of logits, in fp32: the logits, their log-softmax, and the gradients of both.
COPIES = 4


def masked_problem(dtype):
    hidden, weight, bias, labels = problem(TOKENS, VOCAB, dtype, hidden_size=4, ignored=())
    labels[torch.arange(TOKENS, device=DEVICE) % TOKENS >= MASKED] = IGNORE
    return (hidden, weight, bias), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lean", [False, True], ids=["budget", "lean"])
def test_a_vocabulary_of_256k_in_bounded_memory(monkeypatch, lean, dtype):
    inputs, labels = masked_problem(dtype)
    rows = 8
    budget = COPIES * 4 * rows * VOCAB
    monkeypatch.setattr(module, "CHUNK_TILE", rows)
    monkeypatch.setattr(public, "CHUNK_TILE", rows)
    monkeypatch.setattr(module, "LOGITS_BYTES", 10 * budget if lean else budget)

    def call():
        with use_backend("reference"):
            gradients(lambda *x: masked_lm_loss(*x, lean=lean), inputs, labels, 1.0)

    parameters = sum(x.numel() * x.element_size() for x in inputs)
    # Beside the chunk: gradients, a chunk's part of them, and what is saved to recompute the logits.
    assert peak_bytes(call) <= budget + 4 * parameters
    if DEVICE == "cpu":
        assert max(allocations(call)) <= 4 * rows * VOCAB < 4 * MASKED * VOCAB


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_change_nothing(monkeypatch, reduction):
    *inputs, labels = problem(40, 50, torch.float64, ignored=(0, 5, 6, 39))
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": reduction}

    def call(*x):
        return masked_lm_loss(*x, **options)

    with use_backend("reference"):
        whole, right = gradients(call, inputs, labels, 2.0), masked_lm_loss(*inputs, labels, return_accuracy=True)[1]
        monkeypatch.setattr(module, "LOGITS_BYTES", 1)
        monkeypatch.setattr(module, "CHUNK_TILE", 8)
        chunked, also = gradients(call, inputs, labels, 2.0), masked_lm_loss(*inputs, labels, return_accuracy=True)[1]
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(chunked, whole, strict=True))
    assert right.item() == also.item()


def test_what_fits_is_computed_once(monkeypatch):
    """Recomputing costs a second product; logits that fit are not recomputed."""
    inputs, labels = masked_problem(torch.float32)
    monkeypatch.setattr("fusebert.kernels.reference.checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    with use_backend("reference"):
        masked_lm_loss(*inputs, labels)
