"""Attention without kernels, by PyTorch's operators."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED, compare, lengths_to_cu, randn
from oracle import DEVICE

from fusebert.kernels import attention, attention_varlen, attention_varlen_separate, reference, use_backend


@pytest.fixture
def reference_backend():
    with use_backend("reference"):
        yield


def packed(lengths_q, lengths_k, spare):
    """(ours, the definition, q k v) of packed cross-attention with ``spare`` rows after the last segment."""
    cu_q, cu_k = lengths_to_cu(lengths_q), lengths_to_cu(lengths_k)
    q = randn(32 + spare, 4, 16)
    k, v = (randn(sum(lengths_k), 2, 16) for _ in range(2))

    def definition(*x):
        return reference.attention_varlen(*x, cu_q, cu_k)[0]

    def ours(*x):
        return attention_varlen_separate(*x, cu_q, 20, cu_k, 20)

    return ours, definition, [q, k, v]


# Segment by segment, in one call of equal segments, and in one call with padding.
PACKED = pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([7, 0, 20, 5], [9, 3, 20, 0]), ([16, 16], [20, 20]), ([7, 0, 20, 5, 0], [9, 0, 20, 13, 0])],
)
SPARE = pytest.mark.parametrize("spare", [0, 2])


@PACKED
@SPARE
def test_packed(lengths_q, lengths_k, spare, reference_backend):
    compare(*packed(lengths_q, lengths_k, spare))


@PACKED
@SPARE
def test_compiles_as_one_graph(lengths_q, lengths_k, spare, reference_backend):
    ours, definition, tensors = packed(lengths_q, lengths_k, spare)
    compare(torch.compile(ours, fullgraph=True, backend="aot_eager"), definition, tensors)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([7, 0, 12, 5], [7, 0, 12, 5]), ([3, 9, 2], [8, 10, 0]), ([60, 3], [60, 3])],  # the last segment by segment
)
@pytest.mark.parametrize("spare", [0, 2])
def test_packed_with_dropout(lengths_q, lengths_k, spare, reference_backend):
    """With v = 1 a row of the result is the share of its weights that were kept, over 1 − p, and 1 in the mean."""
    cu_q, cu_k = lengths_to_cu(lengths_q), lengths_to_cu(lengths_k)
    rows = sum(lengths_q)
    q, k = randn(rows + spare, 4, 16), randn(sum(lengths_k) + spare, 2, 16)
    q[rows:], k[sum(lengths_k) :] = float("nan"), float("nan")
    v = torch.ones_like(k).requires_grad_()
    with torch.no_grad():
        v[sum(lengths_k) :] = float("nan")
    outs = [
        attention_varlen_separate(q, k, v, cu_q, max(lengths_q), cu_k, max(lengths_k), dropout_p=0.25)
        for _ in range(200)
    ]
    (gradient,) = torch.autograd.grad(outs[0].sum(), v)
    outs = torch.stack([out.detach() for out in outs])
    alone = torch.cat([torch.full((n,), bool(m)) for n, m in zip(lengths_q, lengths_k, strict=True)]).to(DEVICE)
    assert outs.isfinite().all()
    assert not outs[:, rows:].any()
    assert not outs[:, :rows][:, ~alone].any()
    kept = outs[:, :rows][:, alone]
    assert kept.std(0).min() > 0
    assert (kept.mean(0) - 1).abs().max() < 0.25
    assert abs(float(kept.mean()) - 1) < 0.02
    # Σ of the result over queries and heads is Σ over keys of v times its gradient.
    torch.testing.assert_close(gradient[: sum(lengths_k)].sum(), outs[0].sum())
    assert not gradient[sum(lengths_k) :].any()


def test_short_segments_train_after_inference_and_stay_apart(reference_backend):
    lengths = [9, 4, 14]
    cu = lengths_to_cu(lengths)
    qkv = randn(27, 3, 2, 16)
    with torch.inference_mode():  # what this call keeps must be fit for autograd
        expected = attention_varlen(qkv, cu, 14)
    qkv[cu[2] - 1] = float("nan")  # the row that the padding of its segment repeats
    qkv.requires_grad_()
    out = attention_varlen(qkv, cu, 14)
    others = torch.ones(27, dtype=torch.bool, device=DEVICE)
    others[cu[1] : cu[2]] = False
    torch.testing.assert_close(out[others], expected[others], rtol=0, atol=0)
    assert out[~others].isnan().all()
    (gradient,) = torch.autograd.grad(out[others].sum(), qkv)
    assert gradient[others].isfinite().all()
    assert gradient[others].abs().max() > 0


def test_a_seed_gives_the_mask_of_the_kernels(reference_backend):
    cu = lengths_to_cu([9, 0, 14])
    qkv = randn(23, 3, 2, 16)
    options = {"dropout_p": 0.4, "seed": SEED, "window": 6}
    out = attention_varlen(qkv, cu, 14, **options)
    with use_backend("triton"):
        torch.testing.assert_close(out, attention_varlen(qkv, cu, 14, **options))


def test_a_sequence_of_padding(reference_backend):
    q, k, v = (randn(2, 2, 9, 16).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out = attention(q, k, v, key_padding_mask=mask)
    assert out[1].abs().max() == 0
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient[1].abs().max() == 0
        assert gradient.isfinite().all()


def test_float64_is_computed_by_pytorch():
    with use_backend("auto"):
        q, k, v = (randn(1, 1, 8, 16).double() for _ in range(3))
        assert attention(q, k, v).dtype == torch.float64
