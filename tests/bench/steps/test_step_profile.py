"""The step's table: what an operator had to do is counted from its arguments, and the time is the operator's."""

import pytest
import torch
from oracle import DEVICE
from steps import random_batch, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusebert.bench.measure.case import Floor
from fusebert.bench.measure.ceilings import Ceilings
from fusebert.bench.measure.result import Profile, ProfiledOperator
from fusebert.bench.steps.profile import AT_ROOFLINE, profile_step, to_do
from fusebert.kernels import use_backend
from fusebert.kernels.attn import torch_path
from fusebert.train.step.flops import batch_flops
from fusebert.train.step.optim import make_optimizer
from fusebert.train.step.step import TrainingStep

CEILINGS = Ceilings(copy_bytes_per_s=1e10, matmul_flops_per_s=1e12, dtype="float32")
DEVICE = torch.device(DEVICE)


def rows_of(run):
    return {row.name: row for row in profile_step(lambda i: run(), DEVICE, CEILINGS, steps=2).operators}


def test_bytes_and_flops_of_operators():
    x, w, b = (torch.randn(*shape, device=DEVICE) for shape in ((64, 48), (32, 48), (32,)))
    ids = torch.randint(0, 64, (10,), device=DEVICE)
    grown = torch.zeros(64, 48, device=DEVICE)

    def run():
        y = torch.addmm(b, x, w.t())
        y.mul_(2.0)
        x.index_select(0, ids)
        grown.copy_(x)
        b.expand(64, 32) + y
        x.view(32, 96).t()  # a view does nothing

    rows = rows_of(run)
    assert set(rows) == {"addmm 64 × 48 × 32", "mul_", "index_select", "copy_", "add"}
    addmm = rows["addmm 64 × 48 × 32"]
    assert addmm.calls == 1
    assert addmm.floor.flops == 2 * 64 * 48 * 32
    assert addmm.floor.bytes == 4 * (32 + 64 * 48 + 48 * 32 + 64 * 32)
    assert rows["mul_"].floor.bytes == 2 * 4 * 64 * 32
    assert rows["index_select"].floor.bytes == 2 * 4 * 10 * 48 + 8 * 10
    assert rows["copy_"].floor.bytes == 2 * 4 * 64 * 48
    assert rows["add"].floor.bytes == 4 * (32 + 2 * 64 * 32)
    assert addmm.floor.floor_ms == pytest.approx(1e3 * max(addmm.floor.flops / 1e12, addmm.floor.bytes / 1e10))
    assert addmm.roofline == pytest.approx(addmm.floor.floor_ms / addmm.ms)


def test_the_optimizer_reads_four_tensors_and_writes_three():
    p = torch.nn.Parameter(torch.randn(100, 10, device=DEVICE))
    optimizer = torch.optim.AdamW([p], fused=True)

    def run():
        p.grad = torch.ones_like(p)
        optimizer.step()

    run()
    (row,) = [row for name, row in rows_of(run).items() if "fused_adamw" in name]
    assert 28 * 1000 <= row.floor.bytes <= 28 * 1000 + 16  # and the step count


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_steps_flops_are_the_formulas(backend, monkeypatch):
    """All of the products of a step, backward too, ours by their own formulas (attention does its scores twice)."""
    monkeypatch.setattr(torch_path, "WORTH_PADDING", 0)  # short segments are padded in one call where that is faster
    model = small_model(dropout=0.0).to(DEVICE)
    batch = random_batch(torch.Generator().manual_seed(0), [9, 4, 3], masked=7, pairs=3, slots=7, max_seqlen=9)
    step = TrainingStep(model, make_optimizer(model, 1e-3, 0.0), clip=1.0, compute_dtype=torch.float32)
    on_device = batch.to(DEVICE)
    with use_backend(backend), sdpa_kernel(SDPBackend.MATH):  # the fused one computes the scores twice
        step([on_device], 1e-3)
        profiled = profile_step(lambda i: step([on_device], 1e-3), DEVICE, CEILINGS, steps=1)
    names = {row.name for row in profiled.operators}
    assert any("backward" in name for name in names)
    assert any("fused_adamw" in name for name in names)
    expected = batch_flops(model.config, batch)
    found = sum(row.floor.flops for row in profiled.operators)
    if backend == "triton":
        assert "fusebert::attention_qkv_backward" in names
        segments = torch.tensor([9, 4, 3])
        bounds = batch.cu_seqlens[1:].contiguous()
        read = torch.bincount(torch.bucketize(batch.masked_positions, bounds, right=True), minlength=3) + 1
        again = 2 * 32 * int((segments.square() + read * segments).sum())
        assert found == expected + again
    else:
        assert found == expected
    for row in profiled.operators:
        assert row.ms > 0, row


def test_what_is_not_at_its_roofline_comes_by_what_it_loses():
    def row(name, ms, floor):
        return ProfiledOperator(name, 1, ms, Floor(0.0, 1.0, floor, "memory"), floor / ms, ms / 10)

    rows = (row("a", 5.0, AT_ROOFLINE * 5.0), row("b", 3.0, 2.0), row("c", 1.95, 0.5), row("d", 0.05, 0.0))
    lost = to_do(Profile(ms=12.0, operator_ms=10.0, operators=rows))
    assert [(row.name, round(row.lost_ms, 6)) for row in lost] == [("c", 1.45), ("b", 1.0)]
