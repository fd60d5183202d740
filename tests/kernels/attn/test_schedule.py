"""The long route's schedule: which program computes which tile. It changes no result."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import lengths_to_cu, randn, use_long_route
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DEVICE

from fusebert.kernels import attention_varlen
from fusebert.kernels.attn import launch
from fusebert.kernels.attn.schedule import BLOCK_S, attn_schedule_tiles, choose_grid

BLOCK = 16


def schedule(lengths, total):
    """[2, slots] from the kernel, in memory that held other values."""
    segments = len(lengths) + 1
    slots = torch.full((2, segments + total // BLOCK), -7, dtype=torch.int32, device=DEVICE)
    attn_schedule_tiles[(math.ceil(segments / BLOCK_S),)](
        lengths_to_cu(lengths), slots, len(lengths), total, slots.shape[1], BLOCK=BLOCK, BLOCK_S=BLOCK_S
    )
    return slots.tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(0, 100), min_size=1, max_size=150), spare=st.integers(0, 40))
def test_every_tile_once_longest_segments_first(lengths, spare):
    segments, firsts = schedule(lengths, sum(lengths) + spare)
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    expected = [s for s in order for _ in range(math.ceil(lengths[s] / BLOCK))] + [
        len(lengths)
    ]  # the rows after the last segment: one tile
    assert segments == expected + [-1] * (len(segments) - len(expected))
    assert firsts[: len(expected)] == [expected.index(s) for s in expected]


def test_segments_that_overlap_stay_within_the_slots():
    total = 64
    slots = torch.full((3, 2, 5 + total // BLOCK), -7, dtype=torch.int32, device=DEVICE)
    cu = torch.tensor([0, 64, 0, 64, 0], dtype=torch.int32, device=DEVICE)
    attn_schedule_tiles[(1,)](cu, slots[1], 4, total, 9, BLOCK=BLOCK, BLOCK_S=BLOCK_S)
    assert (slots[0] == -7).all()
    assert (slots[2] == -7).all()
    assert set(slots[1, 0].tolist()) <= {-1, 0, 2, 4}


def ragged():
    """A long segment among many short ones, empty ones, and rows after the last segment."""
    lengths = [7, 0, 90, 5, 1, 0, 20, 3]
    return lengths, lengths_to_cu(lengths), sum(lengths) + 20


def run(qkv, cu, longest, grad_out):
    leaf = qkv.detach().requires_grad_()
    out = attention_varlen(leaf, cu, longest, dropout_p=0.2, seed=5, window=20)
    return out.detach(), *torch.autograd.grad(out, leaf, grad_out)


def test_the_same_bits_as_the_padded_grid(monkeypatch):
    use_long_route(monkeypatch)
    lengths, cu, total = ragged()
    qkv, grad_out = randn(total, 3, 1, 16), randn(total, 1, 16)
    schedules = []

    def recorded(*arguments):
        schedules.append(choose_grid(*arguments))
        return schedules[-1]

    monkeypatch.setattr(launch, "choose_grid", recorded)
    scheduled = run(qkv, cu, max(lengths), grad_out)
    assert any(slots is not None for _, slots in schedules)
    monkeypatch.setattr(launch, "choose_grid", lambda cu, s, longest, rows, block: (math.ceil(longest / block), None))
    padded = run(qkv, cu, max(lengths), grad_out)
    for a, b in zip(scheduled, padded, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("lengths", "longest", "scheduled"),
    [
        ([512] * 64, 512, False),  # equal lengths: no empty tiles
        ([128, 256, 512, 512, 384] * 12, 512, False),  # BERT's lengths: at most four tiles a segment
        ([8192] + [500] * 63, 8192, True),
        ([32768] + [0] * 7, 32768, True),  # spare segments, as a packed batch has
    ],
)
def test_a_schedule_only_where_it_halves_the_grid(lengths, longest, scheduled):
    block, segments, total = 128, len(lengths) + 1, sum(lengths)
    programs, slots = choose_grid(lengths_to_cu(lengths), segments, longest, total, block)
    padded = segments * math.ceil(longest / block)
    tiles = sum(math.ceil(n / block) for n in lengths) + 1
    assert (slots is not None) == scheduled
    if scheduled:
        assert slots.shape == (2, programs)
        assert tiles <= programs <= tiles + segments
        assert 2 * programs <= padded
    else:
        assert programs * segments == padded
