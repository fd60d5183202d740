"""Values that are not finite stay where PyTorch has them: no other head or segment sees them."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED, lengths_to_cu, randn
from oracle import DEVICE

from fusebert.kernels import attention, attention_varlen, reference

LENGTHS, HEADS, HEAD_DIM = [5, 9, 3], 2, 16
HEAD = 1  # of the bad value
BAD = [float("nan"), float("inf")]


def gradients(function, tensors, grad_out):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def the_same_but_for_one(bad, good, names, segment, head):
    """Bit for bit equal in all other heads and segments."""
    for name, a, b in zip(names, bad, good, strict=True):
        a, b = a.clone(), b.clone()
        a[segment, ..., head, :] = b[segment, ..., head, :] = 0
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
def test_one_head_of_one_segment(place, value, dropout_p, route):
    cu = lengths_to_cu(LENGTHS)
    tensors = {name: randn(sum(LENGTHS), HEADS, HEAD_DIM, dtype=torch.float16) for name in ("q", "k", "v", "dout")}

    def run(q, k, v, dout):
        def ours(*qkv):
            return attention_varlen(torch.stack(qkv, 1), cu, max(LENGTHS), dropout_p=dropout_p, seed=SEED)

        return gradients(ours, (q, k, v), dout)

    good = run(**tensors)
    row = LENGTHS[0] + 4
    changed = {name: x.clone() for name, x in tensors.items()}
    changed[place][row, HEAD, 7] = value
    bad = run(**changed)
    segment = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    the_same_but_for_one(bad, good, ("out", "dq", "dk", "dv"), segment, HEAD)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
def test_the_places_that_are_not_finite_are_those_of_the_definition(place, value, masked, route):
    """At least those: a sum in another order may give NaN for an infinity."""
    tensors = {name: randn(2, HEADS, 7, HEAD_DIM, dtype=torch.float16) for name in ("q", "k", "v", "dout")}
    tensors[place][1, HEAD, 5, 7] = value
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    mask[:, 6:] = False
    options = {"key_padding_mask": mask} if masked else {}
    *qkv, dout = tensors.values()
    ours = gradients(lambda *x: attention(*x, **options), qkv, dout)
    expected = gradients(lambda *x: reference.attention(*x, **options)[0], [x.double() for x in qkv], dout.double())
    for name, a, e in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        lost = ~e.isfinite() & a.isfinite()
        if masked and name in ("dk", "dv"):
            lost[:, :, 6:] = False  # padding: a kernel may write 0 without reading it
        assert not lost.any(), f"{name}: finite at {lost.nonzero().tolist()[:5]}"
        assert a[0].isfinite().all(), name
        assert a[1, [h for h in range(HEADS) if h != HEAD]].isfinite().all(), name
