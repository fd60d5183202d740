"""Dropout without kernels on a CPU: random numbers of 16 bits in place of PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusebert.kernels import attention, attention_varlen_separate, reference, use_backend

X = torch.linspace(-2.0, 3.0, 1 << 18).add(0.1).view(512, 512)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97, 1e-3])
def test_share_and_scale(p):
    torch.manual_seed(0)
    scale = reference.dropout(X, p) / X
    kept = scale != 0
    torch.testing.assert_close(scale[kept], torch.full_like(scale[kept], 1 / (1 - p)))
    # Bits of one word serve four elements in a row: each of the four, and each pair, has its share.
    lanes = (~kept).double().view(-1, 4)
    sigma = math.sqrt(p * (1 - p) / len(lanes))
    assert (lanes.mean(0) - p).abs().max() < 5 * sigma
    together = lanes.T @ lanes / len(lanes)
    pairs = together[~torch.eye(4, dtype=torch.bool)]
    assert (pairs - p * p).abs().max() < 5 * math.sqrt(p * p * (1 - p * p) / len(lanes)) + 2 * p * sigma
    rows = (~kept).double().mean(1)
    assert 0.7 < rows.var() / (p * (1 - p) / 512) < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (0, 4), (2, 3, 5)])
def test_shapes_dtypes_and_gradient(shape, dtype):
    x = torch.randn(shape, dtype=dtype).abs().add(1).requires_grad_()
    out = reference.dropout(x, 0.5)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    out.sum().backward()
    assert torch.equal(out.detach(), x.detach() * x.grad)
    assert set(x.grad.flatten().tolist()) <= {0.0, 2.0}


def test_the_generator_of_torch_draws():
    first, second = (reference.dropout(X, 0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = reference.dropout(X, 0.3)
    torch.manual_seed(3)
    assert torch.equal(first, reference.dropout(X, 0.3))
    x = X.clone().requires_grad_()
    out = checkpoint(reference.dropout, x, 0.3, use_reentrant=False)  # draws again in the backward
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient != 0, out != 0)


def test_traced_compiled_and_transformed_calls_draw_anew():
    def f(x):
        return reference.dropout(x, 0.5)

    traced = torch.jit.trace(f, X, check_trace=False)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for call in (traced, compiled):
        first, second = call(X), call(X)
        assert not torch.equal(first, second)
    each = torch.vmap(f, randomness="different")(X[:1].expand(2, 512))
    assert not torch.equal(each[0], each[1])
    assert not reference.dropout(X, 1.0).any()


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("lengths", [None, [9, 9], [9, 4, 5], [40, 3]])  # padded; equal, short, long segments
def test_attention_drops_weights(lengths, heads, monkeypatch):
    """The result and gradients of the definition with the masks that were drawn."""
    scales = []
    draw = reference.keep_scale
    monkeypatch.setattr(reference, "keep_scale", lambda x, p: scales.append(draw(x, p)) or scales[-1])
    n = sum(lengths or [2 * 9])
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float32) for h in (4, heads, heads))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with use_backend("reference"):
        if lengths is None:
            batch = [x.unflatten(0, (2, 9)).transpose(1, 2) for x in inputs]
            out = attention(*batch, dropout_p=0.25).transpose(1, 2).flatten(0, 1)
        else:
            cu = torch.tensor([0, *lengths]).cumsum(0).int()
            out = attention_varlen_separate(*inputs, cu, max(lengths), dropout_p=0.25)
    lengths = lengths or [9, 9]
    masks = [mask != 0 for scale in scales for mask in scale]  # each [H, longest, longest]
    assert len(masks) == len(lengths)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = reference.attention_varlen(
        *exact,
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.tensor([0, *lengths]).cumsum(0).int(),
        dropout_p=0.25,
        dropout_masks=[mask[:, :m, :m] for mask, m in zip(masks, lengths, strict=True)],
    )
    weights = torch.randn(expected.shape)
    grads, right = torch.autograd.grad(out, inputs, weights), torch.autograd.grad(expected, exact, weights.double())
    for a, b in zip((out, *grads), (expected, *right), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_double_backward_of_dropped_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4).requires_grad_() for _ in range(3))
    with use_backend("reference"):
        out = attention(q, k, v, dropout_p=0.5)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    gradient.square().sum().backward()
    assert q.grad.isfinite().all()
    assert v.grad.abs().max() > 0
