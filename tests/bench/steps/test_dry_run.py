"""The integers that a dry step writes in place of the kernels."""

import pytest
import torch

pytest.importorskip("triton")

from oracle import DEVICE

from fusebert.bench.steps.dry_run import schedule
from fusebert.kernels.attn.schedule import choose_grid


@pytest.mark.parametrize("lengths", [[300, 5, 0, 128, 129, 300, 16], [64] * 70])
def test_the_schedule_is_the_kernels(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows, block = int(bounds[-1]) + 7, 64
    num_slots, slots = choose_grid(bounds.to(DEVICE), len(lengths) + 1, 64 * max(lengths), rows, block)
    assert slots is not None
    expected, found = schedule(bounds, num_slots, rows, block), slots.cpu()
    used = expected[0] >= 0
    assert found[0].tolist() == expected[0].tolist()
    assert found[1, used].tolist() == expected[1, used].tolist()
