"""Batches of one shape, with slack after the texts: on a CPU static buffers, on a GPU captured as CUDA graphs."""

import warnings
from pathlib import Path

import pytest
import torch
from oracle import DEVICE
from task_examples import TASKS, examples_of, model_of

from fusebert.model.hf.encoders import open_encoder
from fusebert.model.text_batch import TextBatch
from fusebert.train.step.optim import make_optimizer
from fusebert.train.step.step import TrainingStep
from fusebert.train.tasks.examples import EpochBatches

VOCABULARY = 200


def trained(task: str, folder: Path, static: bool) -> tuple[list[list[TextBatch]], list[torch.Tensor]]:
    """The batches of an epoch; the weights after it, and the sums of each step."""
    examples = examples_of(task, 53, VOCABULARY)
    batches = EpochBatches(examples, 8, 100, seed=0, epochs=1, static=static)
    torch.manual_seed(0)
    model, _ = model_of(task, open_encoder(folder))
    model.eval().to(DEVICE)  # without dropout
    step = TrainingStep(
        model, make_optimizer(model, 1e-3, 0.0), clip=1.0, compute_dtype=torch.float32, graph=static, losses=1
    )
    windows = list(batches.epoch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a capture that fails
        sums = [step([batch.to(DEVICE) for batch in window], 1e-3).sums for window in windows]
    return windows, [*model.parameters(), *sums]


@pytest.mark.parametrize("task", TASKS)
def test_batches_of_one_shape_give_the_same_step(task: str, place: Path) -> None:
    windows, expected = trained(task, place / "model", static=False)
    static, found = trained(task, place / "model", static=True)
    batches = [batch for window in static for batch in window]
    shapes = {tuple(x.shape for x in (batch.input_ids, batch.labels, batch.cu_seqlens)) for batch in batches}
    assert len(shapes) == 1
    assert len({batch.max_seqlen for batch in batches}) == 1
    assert [[batch.num_labels for batch in window] for window in static] == [
        [batch.num_labels for batch in window] for window in windows
    ]
    assert any(batch.num_tokens < len(batch.input_ids) for batch in batches)  # slack
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_on_a_gpu(task: str, dtype: torch.dtype, place: Path) -> None:
    batches = EpochBatches(examples_of(task, 100, VOCABULARY), 8, 1 << 20, seed=0, epochs=1, static=True)
    model, _ = model_of(task, open_encoder(place / "model"))
    model.train().cuda()
    step = TrainingStep(model, make_optimizer(model, 1e-3, 0.0), clip=1.0, compute_dtype=dtype, graph=True, losses=1)
    windows = [[batch.map(torch.Tensor.pin_memory) for batch in window] for window in batches.epoch(0)]
    for window in windows[:6]:  # compiles the kernels, captures
        step(window, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for window in windows[6:]:
            result = step(window, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.sums).all()
