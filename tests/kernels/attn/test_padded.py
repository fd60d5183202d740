"""Padded attention on the kernels against the definition in float64, short and long route."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SEED, compare, randn
from oracle import DEVICE, DOT_DTYPES, assert_as_good_as_torch

from fusebert.kernels import attention, attention_dropout_mask, reference


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "n_q", "n_k", "head_dim"),
    [(2, 2, 2, 33, 33, 16), (1, 4, 1, 5, 40, 32), (2, 2, 1, 50, 3, 16), (1, 1, 1, 1, 1, 16), (1, 2, 2, 20, 20, 96)],
)
def test_padded(batch, heads, key_heads, n_q, n_k, head_dim, dtype, route):
    q = randn(batch, heads, n_q, head_dim, dtype=dtype)
    k, v = (randn(batch, key_heads, n_k, head_dim, dtype=dtype) for _ in range(2))
    compare(attention, lambda *x: reference.attention(*x)[0], [q, k, v])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_mask_dropout_and_a_sequence_of_padding(p, route):
    b, h, n = 3, 2, 41
    q, k, v = (randn(b, h, n, 16) for _ in range(3))
    mask = torch.rand(b, n, device=DEVICE) < 0.6
    mask[0, 25:] = False
    mask[1] = False
    kept = attention_dropout_mask(p, SEED, n, n, b * h, device=DEVICE).view(b, h, n, n) if p else None
    compare(
        lambda *x: attention(*x, key_padding_mask=mask, dropout_p=p, seed=SEED),
        lambda *x: reference.attention(*x, key_padding_mask=mask, dropout_p=p, dropout_mask=kept)[0],
        [q, k, v],
    )
    out = attention(q, k, v, key_padding_mask=mask)
    assert out[1].abs().max() == 0


def test_mask_and_window_that_leave_some_rows_without_keys(route):
    q, k, v = (randn(2, 1, 60, 16) for _ in range(3))
    mask = torch.ones(2, 60, dtype=torch.bool, device=DEVICE)
    mask[0, 10:40] = False
    compare(
        lambda *x: attention(*x, key_padding_mask=mask, window=4),
        lambda *x: reference.attention(*x, key_padding_mask=mask, window=4)[0],
        [q, k, v],
    )


@pytest.mark.parametrize("magnitude", [1e-3, 5.0])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_magnitudes(magnitude, dtype, route):
    q, k, v = (randn(1, 2, 40, 16, dtype=dtype, scale=magnitude) for _ in range(3))
    compare(attention, lambda *x: reference.attention(*x)[0], [q, k, v], pytorch=F.scaled_dot_product_attention)


def test_any_strides_and_scale(route):
    storage = randn(2, 30, 3, 2, 16)  # as a projection writes it: [B, N, 3, H, D]
    q, k, v = (x.transpose(1, 2) for x in storage.unbind(2))
    v = v.transpose(2, 3).contiguous().transpose(2, 3)  # the head's elements are not next to each other
    compare(lambda *x: attention(*x, scale=0.5), lambda *x: reference.attention(*x, scale=0.5)[0], [q, k, v])
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


def test_lse(route):
    q, k, v = (randn(2, 2, 35, 16) for _ in range(3))
    mask = torch.ones(2, 35, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    _, lse = attention(q, k, v, key_padding_mask=mask, return_lse=True)
    oracle = reference.attention(q.double(), k.double(), v.double(), key_padding_mask=mask)[1]
    assert lse[1].eq(-math.inf).all()
    assert_as_good_as_torch(lse[0], oracle[0], reference.attention(q, k, v)[1][0], "lse")
