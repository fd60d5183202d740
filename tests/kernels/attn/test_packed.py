"""Packed attention on the kernels against the definition in float64, short and long route."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED, compare, lengths_to_cu, randn, use_long_route
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DOT_DTYPES

from fusebert.kernels import attention_dropout_mask, attention_varlen, attention_varlen_separate, reference
from fusebert.kernels.attn import op, torch_path

# scale, dropout_p, seed, window, return_lse of op.packed_qkv: the kernels without the host's checks, as on a GPU.
OPTIONS = (0.25, 0.0, None, None, False)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [
        ([1], 1, 16),
        ([5, 0, 1, 33, 0], 2, 16),
        ([16, 32, 16], 1, 64),
        ([37, 12], 1, 48),
        ([20], 2, 80),
        ([17, 3], 1, 7),
    ],
)
def test_packed(lengths, heads, head_dim, dtype, route):
    cu = lengths_to_cu(lengths)
    qkv = randn(sum(lengths), 3, heads, head_dim, dtype=dtype)

    def definition(x):
        return reference.attention_varlen(*x.unbind(1), cu, cu)[0]

    # With one key dQ and dK are 0: dP − δ cancels, in terms that are ‖k‖ ‖v‖ / √D = 4 times as large as dO, all of dV.
    roundings = 4 if lengths == [1] else 1
    compare(lambda x: attention_varlen(x, cu, max(lengths)), definition, [qkv], roundings=roundings)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_dropout_applies_attention_dropout_mask(dtype, route):
    lengths, heads, p = [19, 0, 33, 1], 2, 0.3
    cu = lengths_to_cu(lengths)
    qkv = randn(sum(lengths), 3, heads, 16, dtype=dtype)
    planes = attention_dropout_mask(p, SEED, 33, 33, len(lengths) * heads, device=DEVICE)
    masks = [planes[s * heads : (s + 1) * heads, :n, :n] for s, n in enumerate(lengths)]

    def definition(x):
        return reference.attention_varlen(*x.unbind(1), cu, cu, dropout_p=p, dropout_masks=masks)[0]

    compare(lambda x: attention_varlen(x, cu, 33, dropout_p=p, seed=SEED), definition, [qkv])
    seed = torch.tensor([SEED], device=DEVICE)
    from_tensor = attention_varlen(qkv, cu, 33, dropout_p=p, seed=seed)
    assert torch.equal(from_tensor, attention_varlen(qkv, cu, 33, dropout_p=p, seed=SEED))
    assert not torch.equal(from_tensor, attention_varlen(qkv, cu, 33, dropout_p=p, seed=SEED + 1))


@pytest.mark.parametrize("window", [1, 3, 40])
def test_window(window, route):
    lengths = [50, 1, 70, 0]
    cu = lengths_to_cu(lengths)
    qkv = randn(sum(lengths), 3, 1, 16)

    def definition(x):
        return reference.attention_varlen(*x.unbind(1), cu, cu, window=window)[0]

    compare(lambda x: attention_varlen(x, cu, 70, window=window), definition, [qkv])


def test_a_window_of_zero_is_the_identity(route):
    cu = lengths_to_cu([33, 7])
    qkv = randn(40, 3, 1, 16).requires_grad_()
    out = attention_varlen(qkv, cu, 33, window=0)
    grad_out = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, qkv, grad_out)[0].unbind(1)
    torch.testing.assert_close(out, qkv[:, 2])
    torch.testing.assert_close(dv, grad_out)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_rows_after_the_last_segment_are_zeros(route):
    cu = lengths_to_cu([9, 20])
    qkv = randn(29 + 45, 3, 2, 16).requires_grad_()
    out = attention_varlen(qkv, cu, 20)
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out[29:].abs().max() == 0
    assert dqkv[29:].abs().max() == 0
    assert torch.equal(out[:29], attention_varlen(qkv[:29], cu, 20))


def test_a_segment_longer_than_max_seqlen_is_nan(route):
    out, _ = op.packed_qkv(randn(40, 3, 1, 16), lengths_to_cu([30, 10]), 16, *OPTIONS)
    assert out[:30].isnan().any(-1).all()
    assert out[30:].isfinite().all()


@pytest.mark.parametrize("cu", [[0, 50, 20], [5, -7, 40], [0, 1000, 2000]])
def test_invalid_cu_seqlens_do_not_write_outside_the_tensors(cu, route):
    buffer = randn(3, 40, 3, 1, 16)
    before = buffer.clone()
    qkv = buffer[1].detach().requires_grad_()
    out, _ = op.packed_qkv(qkv, torch.tensor(cu, dtype=torch.int32, device=DEVICE), 64, *OPTIONS)
    torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_separate_tensors_of_different_lengths_and_grouped_heads(dtype, route):
    lengths_q, lengths_k = [7, 20, 0, 5], [30, 1, 4, 0]
    cu_q, cu_k = lengths_to_cu(lengths_q), lengths_to_cu(lengths_k)
    q = randn(sum(lengths_q), 4, 16, dtype=dtype)
    k, v = (randn(sum(lengths_k), 2, 16, dtype=dtype) for _ in range(2))
    compare(
        lambda *x: attention_varlen_separate(*x, cu_q, 20, cu_k, 30),
        lambda *x: reference.attention_varlen(*x, cu_q, cu_k)[0],
        [q, k, v],
        pytorch=lambda *x: torch_path.packed(*x, cu_q, cu_k, 20, 30, 0.25, 0.0, None, None, False)[0],
    )


def test_separate_tensors_default_to_the_queries_segments(route):
    cu = lengths_to_cu([12, 21])
    qkv = randn(33, 3, 2, 16)
    together = attention_varlen(qkv, cu, 21, window=6)
    assert torch.equal(attention_varlen_separate(*qkv.unbind(1), cu, 21, window=6), together)


def test_same_inputs_same_bits(route):
    cu = lengths_to_cu([40, 25])
    qkv = randn(65, 3, 2, 16).requires_grad_()

    def run():
        out = attention_varlen(qkv, cu, 40, dropout_p=0.1, seed=SEED)
        return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    head_dim=st.sampled_from([1, 8, 16, 24, 40]),
    heads=st.integers(1, 2),
    p=st.sampled_from([0.0, 0.5]),
    window=st.sampled_from([None, 2, 5, 100]),
    long=st.booleans(),
)
def test_random_shapes(lengths, head_dim, heads, p, window, long):
    longest = max([*lengths, 1])
    cu = lengths_to_cu(lengths)
    qkv = randn(sum(lengths), 3, heads, head_dim)
    planes = attention_dropout_mask(p, SEED, longest, longest, len(lengths) * heads, device=DEVICE)
    masks = [planes[s * heads : (s + 1) * heads, :n, :n] for s, n in enumerate(lengths)] if p else None

    def definition(x):
        return reference.attention_varlen(*x.unbind(1), cu, cu, dropout_p=p, dropout_masks=masks, window=window)[0]

    with pytest.MonkeyPatch.context() as monkeypatch:
        if long:
            use_long_route(monkeypatch)
        compare(
            lambda x: attention_varlen(x, cu, longest, dropout_p=p, seed=SEED, window=window),
            definition,
            [qkv],
            roundings=4,  # P, δ, dS and the product: a segment may be two rows
        )
