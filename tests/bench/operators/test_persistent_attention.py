"""The persistent kernels of short attention give what the kernels give that have one pair a program."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE

from fusebert.bench.operators.persistent_attention_kernels import Persistent
from fusebert.kernels import attention_dropout_mask
from fusebert.kernels.attn.launch import NO_WINDOW, Problem, launch_backward, launch_forward, new_output, new_stats

pytest.importorskip("triton")
HEADS, LENGTHS = 3, [20, 1, 0, 32, 7]


def problem(head_dim: int, dropout_p: float, dtype: torch.dtype, window: int = NO_WINDOW) -> Problem:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), HEADS, head_dim, device=DEVICE).to(dtype) for _ in range(3))
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    seed = torch.tensor([7], device=DEVICE)
    return Problem(q, k, v, cu, cu, None, seed, 32, 32, head_dim**-0.5, dropout_p, window)


def run(of: Problem) -> list[torch.Tensor]:
    """out, statistics, dq, dk, dv."""
    out, stats = new_output(of.q), new_stats(of.q)
    launch_forward(of, out, stats)
    dout = torch.randn(out.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(out.dtype)
    gradients = [new_output(x) for x in (of.q, of.k, of.v)]
    launch_backward(of, out, stats, dout, *gradients)
    return [out, stats, *gradients]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "dropout_p"), [(16, 0.0), (24, 0.3)])
def test_the_same_as_with_one_pair_a_program(head_dim: int, dropout_p: float, dtype: torch.dtype) -> None:
    """15 pairs on the interpreter's 4 programs, with unequal and empty segments."""
    of = problem(head_dim, dropout_p, dtype)
    expected = run(of)
    with Persistent("attn_short_forward", 4, 2, 2).installed(), Persistent("attn_short_backward", 4, 2, 2).installed():
        found = run(of)
    assert expected[0].abs().max() > 0.1
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if dtype == torch.float16 else 1e-6)
    if dropout_p:
        assert not attention_dropout_mask(dropout_p, 7, 32, 32).all()


def test_what_they_do_not_support_is_refused() -> None:
    with (
        Persistent("attn_short_forward", 4, 2, 2).installed(),
        pytest.raises(ValueError, match="no padding mask, no window"),
    ):
        run(problem(16, 0.0, torch.float16, window=3))
