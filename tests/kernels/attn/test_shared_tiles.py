"""Heads of short segments share a tile."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED, compare, lengths_to_cu, randn
from oracle import DEVICE, DOT_DTYPES

from fusebert.kernels import attention, attention_dropout_mask, attention_varlen, reference
from fusebert.kernels.attn import config as attention_config

DTYPES = [dtype for dtype in DOT_DTYPES if dtype.itemsize == 2]  # float32 tiles hold one head


@pytest.mark.parametrize(
    ("num_heads", "max_q", "max_k", "groups", "dtype", "heads"),
    [
        (12, 16, 16, 1, torch.bfloat16, 4),
        (12, 9, 32, 1, torch.bfloat16, 2),
        (6, 16, 16, 1, torch.float16, 2),
        (3, 16, 16, 1, torch.float16, 1),
        (12, 33, 33, 1, torch.bfloat16, 1),
        (12, 16, 16, 2, torch.bfloat16, 1),
        (12, 16, 16, 1, torch.float32, 1),
    ],
)
def test_how_many_heads_share_a_tile(num_heads, max_q, max_k, groups, dtype, heads):
    config = attention_config.short_config("short_forward", 64, num_heads, max_q, max_k, groups, dtype, False)
    assert config.heads == heads
    assert num_heads % heads == 0
    assert (config.block_m, config.block_n) == tuple(heads * attention_config.block(n) for n in (max_q, max_k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "window"),
    [([5, 0, 16, 1], 4, 16, None), ([16, 3], 6, 24, 2), ([30, 17, 0, 1], 2, 16, None), ([9], 12, 16, 0)],
)
def test_packed(lengths, heads, head_dim, window, dtype):
    cu, spare, p = lengths_to_cu(lengths), 21, 0.3
    longest = max(lengths)
    qkv = randn(sum(lengths) + spare, 3, heads, head_dim, dtype=dtype)
    planes = attention_dropout_mask(p, SEED, longest, longest, len(lengths) * heads, device=DEVICE)
    masks = [planes[s * heads : (s + 1) * heads, :n, :n] for s, n in enumerate(lengths)]

    def definition(x):
        return reference.attention_varlen(*x.unbind(1), cu, cu, dropout_p=p, dropout_masks=masks, window=window)[0]

    compare(
        lambda x: attention_varlen(x, cu, longest, dropout_p=p, seed=SEED, window=window),
        definition,
        [qkv],
        roundings=4,
    )


@pytest.mark.parametrize(("n_q", "n_k"), [(13, 13), (3, 30), (20, 7)])
def test_padded_with_a_mask(n_q, n_k):
    q = randn(2, 4, n_q, 16, dtype=torch.float16)
    k, v = (randn(2, 4, n_k, 16, dtype=torch.float16) for _ in range(2))
    mask = torch.rand(2, n_k, device=DEVICE) < 0.7
    mask[0] = False

    def ours(*x):
        return attention(*x, key_padding_mask=mask)

    compare(ours, lambda *x: reference.attention(*x, key_padding_mask=mask)[0], [q, k, v], roundings=2)
    _, lse = attention(q, k, v, key_padding_mask=mask, return_lse=True)
    expected = reference.attention(q.double(), k.double(), v.double(), key_padding_mask=mask)[1]
    torch.testing.assert_close(lse, expected.float())
