"""Attention at extreme shapes: 32k rows, offsets beyond 31 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import compare, lengths_to_cu, randn
from oracle import DEVICE, assert_as_good_as_torch

from fusebert.kernels import attention, attention_varlen, reference


@pytest.fixture
def poisoned_memory():
    """Off: it would fill gigabytes that `test_offsets_beyond_31_bits` only reserves."""


@pytest.mark.parametrize(("n_q", "n_k"), [(3, 32768), (32768, 3)])
def test_32k_of_one_side(n_q, n_k):
    q = randn(1, 1, n_q, 16, dtype=torch.float16)
    k, v = (randn(1, 1, n_k, 16, dtype=torch.float16) for _ in range(2))
    compare(attention, lambda *x: reference.attention(*x)[0], [q, k, v], pytorch=F.scaled_dot_product_attention)


def test_32k_of_both_under_a_window():
    """Compared with the definition around a few places, because a query reaches no farther than the window."""
    n, window, dtype = 32768, 40, torch.float16
    qkv = randn(n, 3, 1, 16, dtype=dtype).requires_grad_()
    out = attention_varlen(qkv, lengths_to_cu([n]), n, window=window)
    grad_out = torch.zeros_like(out)
    places = [slice(0, 30), slice(16370, 16400), slice(n - 30, n)]
    for place in places:
        grad_out[place] = torch.randn_like(out[place])
    (dqkv,) = torch.autograd.grad(out, qkv, grad_out)
    elsewhere = torch.ones(n, dtype=torch.bool, device=DEVICE)
    for place in places:
        near = slice(max(place.start - window, 0), min(place.stop + window, n))
        inside = slice(place.start - near.start, place.stop - near.start)
        elsewhere[near] = False
        results = {}
        for as_dtype in (torch.float64, dtype):
            x = qkv.detach()[near].to(as_dtype).requires_grad_()
            o = reference.attention(*(t.transpose(0, 1)[None] for t in x.unbind(1)), window=window)[0][0, :, inside]
            (gradient,) = torch.autograd.grad(o, x, grad_out[place].to(as_dtype).transpose(0, 1))
            results[as_dtype] = o.transpose(0, 1).detach(), gradient
        for name, ours, oracle, torchs in zip(
            ("out", "dqkv"), (out.detach()[place], dqkv[near]), results[torch.float64], results[dtype], strict=True
        ):
            assert_as_good_as_torch(ours, oracle, torchs, f"{name} at {place}")
    assert dqkv[elsewhere].abs().max() == 0


@pytest.mark.parametrize("lengths", [[3], [1, 1, 1]])
def test_offsets_beyond_31_bits(lengths):
    """Rows are 2^30 elements apart. The system reserves that memory but backs only the pages that are touched."""
    rows, stride, width = 3, 2**30, 3 * 16
    storage = torch.empty((rows - 1) * stride + width, dtype=torch.float16, device=DEVICE)
    qkv = storage.as_strided((rows, 3, 1, 16), (stride, 16, 16, 1))
    qkv.copy_(randn(rows, 3, 1, 16, dtype=torch.float16))
    cu = lengths_to_cu(lengths)
    results = []
    for x in (qkv, qkv.contiguous()):
        leaf = x.detach().requires_grad_()
        out = attention_varlen(leaf, cu, 3)
        results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), leaf)))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)
