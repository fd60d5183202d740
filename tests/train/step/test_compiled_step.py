"""The step under torch.compile: eager's losses and gradients, one graph, no recompilation for other lengths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from oracle import DEVICE, assert_as_good_as_torch
from steps import random_batch, small_model
from torch import Tensor
from torch._dynamo.utils import counters

from fusebert.model.batch import PackedBatch
from fusebert.train.step.optim import make_optimizer
from fusebert.train.step.step import TrainingStep

LENGTHS = ([9, 4, 3], [5, 10, 1], [8, 8, 0], [10, 6, 0])  # 16 tokens in three segments each


@pytest.fixture(autouse=True)
def _a_compiler() -> Iterator[None]:
    """Skips without a C++ compiler, which Inductor needs on a CPU, and clears what was compiled before. Compiling in
    this process saves the start of others."""
    if DEVICE == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler: install g++, or name one in CXX")
    torch.compiler.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch.compiler.reset()


def windows(steps: int) -> list[list[PackedBatch]]:
    """Two micro-batches a step, of one shape, with other lengths, labels and pairs in each."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(2 * steps):
        batch = random_batch(generator, LENGTHS[i % 4], masked=3 + i % 4, pairs=i % 3, slots=7, max_seqlen=10)
        found.append(batch.to(DEVICE))
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def make(dtype: torch.dtype, **options: bool) -> TrainingStep:
    model = small_model(dropout=0.0, layers=1).to(DEVICE, dtype).train()
    return TrainingStep(model, make_optimizer(model, 1e-3, 0.01), clip=0.5, compute_dtype=torch.float32, **options)


def gradients(step: TrainingStep, window: list[PackedBatch]) -> dict[str, Tensor]:
    """The gradients of all parameters, and the sums of the window, before the update."""
    for i, batch in enumerate(window):
        step.micro_batch(batch, first=i == 0)
    found = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    found |= {"sums": step.sums.float()}
    step.optimizer.zero_grad(set_to_none=True)
    step.sums.zero_()
    return {name: x.clone() for name, x in found.items()}


def test_compiled_it_is_the_same_step_and_is_compiled_once() -> None:
    first, *others = windows(4)
    compiled, eager, exact = make(torch.float32, compiled=True), make(torch.float32), make(torch.float64)
    ours, torchs, oracle = (gradients(step, first) for step in (compiled, eager, exact))
    assert len(oracle) > 20
    assert ours.keys() == torchs.keys() == oracle.keys()
    for name in oracle:
        assert_as_good_as_torch(ours[name], oracle[name], torchs[name], name)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, window in enumerate(others):
            results = [step(window, lr=1e-2 / (1 + i)) for step in (compiled, eager)]
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
