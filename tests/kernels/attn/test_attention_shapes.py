"""`kernels.attention` where shapes are extreme: heads sharing a tile, 32k keys, offsets beyond 31 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import compare, lengths_to_cu, randn
from oracle import DEVICE, DOT_DTYPES, assert_as_good_as_torch

from fusebert.kernels import attention, attention_dropout_mask, attention_varlen, reference, use_backend
from fusebert.kernels.attn import config as attention_config
from fusebert.kernels.attn.launch import NO_WINDOW, Problem

SEED = 77


@pytest.fixture(autouse=True)
def triton_backend():
    torch.manual_seed(3)
    with use_backend("triton"):
        yield


# ------------------------------------------------------------------------------------------------ heads sharing a tile


def small_tiles(monkeypatch, full=64):
    """Heads share tiles of ``full`` rows, whatever the dtype."""
    short = attention_config._short
    monkeypatch.setattr(attention_config, "FULL_TILE", full)
    monkeypatch.setattr(attention_config, "_short", lambda longest, h, q, k, _: short(128, h, q, k, torch.float16))


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
    config = attention_config.short_forward(64, num_heads, max_q, max_k, groups, dtype, False)
    assert config.heads == heads
    assert num_heads % heads == 0
    assert (config.block_m, config.block_n) == tuple(heads * attention_config.block(n) for n in (max_q, max_k))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "window"),
    [([5, 0, 16, 1], 4, 16, None), ([16, 3], 6, 24, 2), ([30, 17, 0, 1], 2, 16, None), ([9], 12, 16, 0)],
)
def test_packed(lengths, heads, head_dim, window, dtype, monkeypatch):
    small_tiles(monkeypatch)
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
def test_padded_with_a_mask(n_q, n_k, monkeypatch):
    small_tiles(monkeypatch)
    q = randn(2, 4, n_q, 16)
    k, v = (randn(2, 4, n_k, 16) for _ in range(2))
    mask = torch.rand(2, n_k, device=DEVICE) < 0.7
    mask[0] = False

    def ours(*x):
        return attention(*x, key_padding_mask=mask)

    compare(ours, lambda *x: reference.attention(*x, key_padding_mask=mask)[0], [q, k, v], roundings=2)
    _, lse = attention(q, k, v, key_padding_mask=mask, return_lse=True)
    expected = reference.attention(q, k, v, key_padding_mask=mask)[1]
    torch.testing.assert_close(lse, expected)


# ------------------------------------------------------------------------------------------------------- long sequences


@pytest.mark.parametrize(("n_q", "n_k"), [(3, 32768), (32768, 3)])
def test_32k_of_one_side(n_q, n_k):
    q = randn(1, 1, n_q, 16, dtype=torch.float16)
    k, v = (randn(1, 1, n_k, 16, dtype=torch.float16) for _ in range(2))
    compare(attention, lambda *x: reference.attention(*x)[0], [q, k, v], pytorch=F.scaled_dot_product_attention)


def test_32k_of_both_under_a_window():
    """Against the definition around a few places: a query reaches no farther than the window."""
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
    """Rows 2^30 elements apart: memory that is reserved, but only where it is read and written made real."""
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


# --------------------------------------------------------------------------------------------------- float32's products


@pytest.mark.parametrize(
    ("dtype", "setting", "expected"),
    [
        (torch.float32, None, "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "ieee", "ieee"),
        (torch.float16, "tf32", "ieee"),
    ],
)
def test_float32_is_float32_unless_torch_allows_tf32(dtype, setting, expected):
    q = randn(4, 1, 16, dtype=dtype)
    cu = lengths_to_cu([4])
    problem = Problem(q, q, q, cu, cu, None, None, 4, 4, 0.25, 0.0, NO_WINDOW)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if setting is not None:
            matmul.fp32_precision = setting
        arguments = problem.arguments(attention_config.Config(16, 16, 4, 1))
    finally:
        matmul.fp32_precision = before
    assert arguments["PRECISION"] == expected
