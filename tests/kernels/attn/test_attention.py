"""`kernels.attention`: every form, on the Triton path, against the definition in float64."""

from __future__ import annotations

import importlib
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from attention_cases import compare, lengths_to_cu, randn, use_long_route
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DOT_DTYPES, assert_as_good_as_torch

from fusebert.kernels import (
    attention,
    attention_dropout_mask,
    attention_varlen,
    attention_varlen_separate,
    reference,
    use_backend,
)
from fusebert.kernels.attn import torch_path as attention_fallback

SEED = 20231


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def inputs_of_its_own_for_each_test(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised outputs are NaN, so that an element no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["short", "long"])
def route(request, monkeypatch):
    """Which kernels run, whatever the shape; long in small tiles, so that small shapes walk several."""
    if request.param == "long":
        use_long_route(monkeypatch)
    return request.param


def skip_the_host_check(monkeypatch):
    """As on a GPU, where the host does not read cu_seqlens."""
    module = importlib.import_module("fusebert.kernels.attn.api")  # the package exports a function of that name
    monkeypatch.setattr(module, "_check_cu_seqlens", lambda *_: None)


# -------------------------------------------------------------------------------------------------------------- packed


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

    compare(lambda x: attention_varlen(x, cu, max(lengths)), definition, [qkv])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_packed_with_dropout_is_exactly_the_materialised_mask(dtype, route):
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
def test_packed_with_window(window, route):
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


def test_rows_behind_the_last_segment_are_zeros(route):
    cu = lengths_to_cu([9, 20])
    qkv = randn(29 + 45, 3, 2, 16).requires_grad_()
    out = attention_varlen(qkv, cu, 20)
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out[29:].abs().max() == 0
    assert dqkv[29:].abs().max() == 0
    assert torch.equal(out[:29], attention_varlen(qkv[:29], cu, 20))


def test_a_segment_longer_than_max_seqlen_is_nan_not_cut_off(monkeypatch, route):
    skip_the_host_check(monkeypatch)
    out = attention_varlen(randn(40, 3, 1, 16), lengths_to_cu([30, 10]), 16)
    assert out[:30].isnan().any(-1).all()
    assert out[30:].isfinite().all()


@pytest.mark.parametrize("cu", [[0, 50, 20], [5, -7, 40], [0, 1000, 2000]])
def test_no_cu_seqlens_makes_the_kernels_leave_their_tensors(cu, monkeypatch, route):
    skip_the_host_check(monkeypatch)
    buffer = randn(3, 40, 3, 1, 16)
    before = buffer.clone()
    qkv = buffer[1].detach().requires_grad_()
    out = attention_varlen(qkv, torch.tensor(cu, dtype=torch.int32, device=DEVICE), 64)
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
        pytorch=lambda *x: attention_fallback.packed(*x, cu_q, cu_k, 20, 30, 0.25, 0.0, None, None, False)[0],
    )


def test_separate_tensors_share_segments_when_keys_have_none_of_their_own(route):
    cu = lengths_to_cu([12, 21])
    qkv = randn(33, 3, 2, 16)
    together = attention_varlen(qkv, cu, 21, window=6)
    assert torch.equal(attention_varlen_separate(*qkv.unbind(1), cu, 21, window=6), together)


# -------------------------------------------------------------------------------------------------------------- padded


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
def test_padded_with_mask_dropout_and_a_sequence_of_padding(p, route):
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


def test_padded_with_mask_and_window_where_some_rows_see_nobody(route):
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
def test_packed_whatever_the_shape(lengths, head_dim, heads, p, window, long):
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


# ---------------------------------------------------------------------------------------------- torch.library, compile


def operator_inputs():
    q, k, v = (randn(1, 2, 20, 16) for _ in range(3))
    qkv = randn(20, 3, 2, 16)
    cu = lengths_to_cu([12, 8])
    seed = torch.tensor([SEED], device=DEVICE)
    padded = (q, k, v, None, None, None, seed, 20, 20, 0.25, 0.1, -1)
    return padded, (qkv, cu, seed, 12, 0.25, 0.1, -1)


def test_opcheck(route):
    padded, packed = operator_inputs()
    ops = torch.ops.fusebert
    out, stats = ops.attention(*padded)
    torch.library.opcheck(ops.attention, padded)
    torch.library.opcheck(ops.attention_backward, (*padded, out, stats, torch.ones_like(out)))
    out, stats = ops.attention_qkv(*packed)
    torch.library.opcheck(ops.attention_qkv, packed)
    torch.library.opcheck(ops.attention_qkv_backward, (*packed, out, stats, torch.ones_like(out)))


def test_compiles_without_a_graph_break(route):
    qkv = randn(20, 3, 2, 16).requires_grad_()
    cu = lengths_to_cu([12, 8])

    def step(x):
        return attention_varlen(x, cu, 12, dropout_p=0.1, seed=SEED).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(qkv), qkv)[0] for f in (compiled, step))
    assert torch.equal(ours, eager)


def test_the_second_derivative_is_an_error_not_a_number():
    qkv = randn(8, 3, 1, 16).requires_grad_()
    out = attention_varlen(qkv, lengths_to_cu([8]), 8)
    (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_seed_none_is_drawn_from_torchs_generator():
    qkv, cu = randn(20, 3, 2, 16), lengths_to_cu([20])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(attention_varlen(qkv, cu, 20, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_autocast_computes_in_its_dtype():
    q, k, v = (randn(1, 1, 16, 16) for _ in range(3))
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert attention(q, k, v).dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.zeros(4, 8, 16)}, ValueError, r"q must have shape \[B, H, N, D\]"),
        ({"k": torch.zeros(2, 2, 8, 16, dtype=torch.float16)}, TypeError, "k must have q's dtype"),
        ({"q": torch.zeros(2, 4, 8, 16, dtype=torch.int64)}, TypeError, "q must be floating point"),
        ({"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16)}, ValueError, "heads must be a multiple"),
        ({"k": torch.zeros(1, 2, 8, 16), "v": torch.zeros(1, 2, 8, 16)}, ValueError, "batch size"),
        ({"v": torch.zeros(2, 2, 9, 16)}, ValueError, "k and v must have the same shape"),
        ({n: torch.zeros(1, 1, 2, 257) for n in "qkv"}, ValueError, r"head size .* 1 … 256; got 257"),
        ({"key_padding_mask": torch.ones(2, 8)}, TypeError, "key_padding_mask must be bool"),
        (
            {"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)},
            ValueError,
            r"key_padding_mask must have shape \(2, 8\)",
        ),
        ({"dropout_p": 1.0}, ValueError, r"dropout probability, must be in \[0, 1\)"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"window": -1}, ValueError, "window must be None or an int"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int"),
    ],
)
def test_bad_padded_input(changes, error, words):
    arguments = {"q": randn(2, 4, 8, 16), "k": randn(2, 2, 8, 16), "v": randn(2, 2, 8, 16)}
    arguments |= {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in changes.items()}
    with pytest.raises(error, match=words):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("cu", "max_seqlen", "error", "words"),
    [
        (torch.tensor([0, 8]), 8, TypeError, "cu_seqlens must be int32"),
        (torch.tensor([0], dtype=torch.int32), 8, ValueError, r"cu_seqlens must have shape \[S \+ 1\]"),
        (torch.tensor([0, 8], dtype=torch.int32), 0, ValueError, "max_seqlen must be an int of at least 1"),
        (torch.tensor([0, 8], dtype=torch.int32), 7.0, ValueError, "max_seqlen must be an int"),
    ],
)
def test_bad_packed_input(cu, max_seqlen, error, words):
    with pytest.raises(error, match=words):
        attention_varlen(randn(8, 3, 1, 16), cu.to(DEVICE), max_seqlen)


@pytest.mark.parametrize(
    ("cu", "max_seqlen", "words"),
    [
        ([0, 5, 3, 8], 8, r"never fall .* \[0, 5, 3, 8\]"),
        ([1, 8], 8, "must start at 0"),
        ([0, 9], 9, "end at most at 8"),
        ([0, 8], 7, "max_seqlen is 7, but the longest segment has 8 rows"),
    ],
)
def test_bad_segments_on_a_cpu(cu, max_seqlen, words):
    with use_backend("auto"), pytest.raises(ValueError, match=words):
        attention_varlen(torch.zeros(8, 3, 1, 16), torch.tensor(cu, dtype=torch.int32), max_seqlen)


# ------------------------------------------------------------------------------------------- without a kernel: PyTorch


@pytest.fixture
def reference_backend():
    with use_backend("reference"):
        yield


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([7, 0, 20, 5], [9, 3, 20, 0]), ([16, 16], [20, 20])])
@pytest.mark.parametrize("spare", [0, 2])
def test_fallback_packed(lengths_q, lengths_k, spare, reference_backend):
    cu_q, cu_k = lengths_to_cu(lengths_q), lengths_to_cu(lengths_k)
    q = randn(32 + spare, 4, 16)
    k, v = (randn(sum(lengths_k), 2, 16) for _ in range(2))

    def definition(*x):
        return reference.attention_varlen(*x, cu_q, cu_k)[0]

    def ours(*x):
        return attention_varlen_separate(*x, cu_q, 20, cu_k, 20)

    compare(ours, definition, [q, k, v])
    compare(torch.compile(ours, fullgraph=True, backend="aot_eager"), definition, [q, k, v])


def test_fallback_drops_what_the_kernels_drop(reference_backend):
    cu = lengths_to_cu([9, 0, 14])
    qkv = randn(23, 3, 2, 16)
    options = {"dropout_p": 0.4, "seed": SEED, "window": 6}
    out = attention_varlen(qkv, cu, 14, **options)
    with use_backend("triton"):
        torch.testing.assert_close(out, attention_varlen(qkv, cu, 14, **options))


def test_fallback_padded_with_padding_only(reference_backend):
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
