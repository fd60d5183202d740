"""Many heads of short segments, with dropout, masks and windows."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED, compare, lengths_to_cu, randn
from oracle import DEVICE, DOT_DTYPES

from fusebert.kernels import attention, attention_dropout_mask, attention_varlen, reference

DTYPES = [dtype for dtype in DOT_DTYPES if dtype.itemsize == 2]


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
