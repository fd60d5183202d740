"""The single-program backward gives what the two long kernels give."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE, assert_as_good_as_torch

from fusebert.bench.operators.whole_backward_kernel import WholeBackward
from fusebert.kernels import reference
from fusebert.kernels.attn import launch
from fusebert.kernels.attn.launch import NO_WINDOW, Problem, new_output, new_stats

pytest.importorskip("triton")
HEADS, LENGTHS = 2, [150, 1, 0, 66]


def problem(dropout_p: float, window: int = NO_WINDOW) -> Problem:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), HEADS, 24, device=DEVICE).half() for _ in range(3))
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    return Problem(q, k, v, cu, cu, None, torch.tensor([7], device=DEVICE), 150, 150, 24**-0.5, dropout_p, window)


def gradients(of: Problem, dout: torch.Tensor) -> list[torch.Tensor]:
    out, stats = new_output(of.q), new_stats(of.q)
    launch.launch_forward(of, out, stats)
    found = [new_output(x) for x in (of.q, of.k, of.v)]
    launch.launch_backward(of, out, stats, dout, *found)
    return found


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_same_as_with_two_kernels(dropout_p: float) -> None:
    """The kernels sum in another order; the mask is the same."""
    of = problem(dropout_p)
    dout = torch.randn(of.q.shape, device=DEVICE).half()
    two = gradients(of, dout)
    with WholeBackward(64, 8).installed():
        one = gradients(of, dout)
    for name, ours, theirs in zip("qkv", one, two, strict=True):
        assert (ours - theirs).float().norm() < 1e-3 * theirs.float().norm(), name


def test_as_good_as_torch() -> None:
    of = problem(0.0)
    dout = torch.randn(of.q.shape, device=DEVICE).half()
    with WholeBackward(64, 8).installed():
        ours = gradients(of, dout)
    begin = 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        begin += length
        if length < 2:
            continue  # with one key dq and dk are 0
        expected = {}
        for dtype in (torch.float64, torch.float16):
            leaves = [x[rows].to(dtype).transpose(0, 1)[None].requires_grad_() for x in (of.q, of.k, of.v)]
            out = reference.attention(*leaves)[0]
            expected[dtype] = torch.autograd.grad(out, leaves, dout[rows].to(dtype).transpose(0, 1)[None])
        for name, found, oracle, torchs in zip(
            "qkv", ours, expected[torch.float64], expected[torch.float16], strict=True
        ):
            assert_as_good_as_torch(found[rows].transpose(0, 1)[None], oracle, torchs, f"d{name} of {length}")


def test_what_it_does_not_support_is_refused() -> None:
    for of in (problem(0.0, window=3), problem(0.0)._replace(max_q=300)):
        with (
            WholeBackward(64, 8).installed(),
            pytest.raises(ValueError, match="no window, no grouped heads, and at most 256"),
        ):
            launch.launch_backward(of, of.q, of.q, of.q, of.q, of.q, of.q)
