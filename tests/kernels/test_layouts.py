"""No operator depends on how its tensors lie in memory: any strides, zero strides and overlaps included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from operator_calls import CALLS
from oracle import DEVICE
from row_cases import permuted

from fusebert.kernels import use_backend


def overlapping(x):
    """Each row begins one element after the one before; other values than ``x``."""
    strides = (1,) * x.dim()
    return x.reshape(-1).as_strided(x.shape, strides) if x.numel() > sum(x.shape) else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "rows apart": lambda x: F.pad(x.unsqueeze(0), (3, 5))[0, ..., 3:-5] if x.is_floating_point() else x,
    "elements apart": lambda x: x.repeat_interleave(3, -1)[..., ::3],
    "permuted": permuted,
    "one value": lambda x: x[..., :1].expand_as(x),
    "one row": lambda x: x[:1].expand_as(x),
    "overlapping": overlapping,
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
KEPT = {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"}  # their values bound the access


def results(function, arguments, dy):
    leaves = {
        k: x.detach().requires_grad_()
        for k, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    with use_backend("triton"):
        y = function(**arguments | leaves)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.expand(y.shape).to(y.dtype))


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(data=st.data())
def test_any_strides(name, data):
    function, arguments = CALLS[name]()
    laid = {
        k: LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)), k)](x)
        for k, x in arguments.items()
        if isinstance(x, torch.Tensor) and k not in KEPT
    }
    dy = torch.randn((), device=DEVICE)  # expanded: no strides but zero
    found = results(function, arguments | laid, dy)
    plain = {k: x.clone(memory_format=torch.contiguous_format) for k, x in laid.items()}
    expected = results(function, arguments | plain, dy)
    for a, b in zip(found, expected, strict=True):
        if name == "masked_lm_loss":  # a BLAS product sums in an order that depends on the strides
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)
