"""What callers may do with attention's output, and what the rows after the last segment hold."""

import pytest
import torch
from oracle import DEVICE

from fusebert.kernels import attention, attention_varlen, attention_varlen_separate, use_backend

CU = torch.tensor([0, 3, 3, 10], dtype=torch.int32, device=DEVICE)


def _padded(q):
    return attention(*q.view(3, 2, 2, 6, 16))


def _packed(q):
    return attention_varlen(q.view(12, 3, 2, 16), CU, 7)


def _separate(q):
    return attention_varlen_separate(*q.view(3, 12, 2, 16), CU, 7)


def _long(q):
    """A sequence of several tiles."""
    return attention(*q.view(3, 1, 1, 72, 16).repeat(1, 1, 1, 4, 1), window=5)


@pytest.mark.parametrize("call", [_padded, _packed, _separate, _long])
def test_in_place_arithmetic_on_the_output(call):
    """The backward of long segments reads the output."""
    shape = 3 * 72 * 16 if call is _long else 12 * 3 * 2 * 16
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    with use_backend("triton"):
        (expected,) = torch.autograd.grad((call(x) * 3).sin().sum(), x)
        out = call(x)
        out *= 3
        (gradient,) = torch.autograd.grad(out.sin().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


OPTIONS = [{}, {"window": 2}, {"seed": 3, "dropout_p": 0.2}]
NAN_ROWS_CASES = [
    *((backend, options, False) for backend in ("reference", "triton") for options in OPTIONS),
    ("reference", {}, True),
]


@pytest.mark.parametrize(("backend", "options", "compiled"), NAN_ROWS_CASES, ids=str)
def test_rows_after_the_last_segment_may_hold_nan(backend, options, compiled):
    data = torch.randn(12, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cu = torch.tensor([0, 3, 10], dtype=torch.int32, device=DEVICE)
    call = torch.compile(attention_varlen, backend="eager") if compiled else attention_varlen
    results = []
    for rest in (0.0, float("nan")):
        data[10:] = rest
        qkv = data.clone().requires_grad_()
        with use_backend(backend):
            out = call(qkv, cu, 7, **options)
        (gradient,) = torch.autograd.grad(out.sin().sum(), qkv)
        assert not out[10:].any()
        assert not gradient[10:].any()
        results.append((out.detach(), gradient))
    for finite, other in zip(*results, strict=True):
        assert torch.equal(finite, other)
