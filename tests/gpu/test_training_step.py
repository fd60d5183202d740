"""One training step of `tiny` on the kernels: the losses and each weight's gradient, beside the reference's."""

from __future__ import annotations

import pytest
import torch
from gpu_check import ON_CPU
from oracle import DEVICE, assert_as_good_as_torch
from steps import random_batch

from fusebert.kernels import use_backend
from fusebert.model.config import BertConfig
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.step.step import TrainingStep


def step(backend: str, dtype: torch.dtype, parameters: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The losses, and what gradient descent at a rate of 1 subtracts from each weight."""
    torch.manual_seed(0)
    config = BertConfig.preset("tiny", 50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForPreTraining(config).to(DEVICE, parameters).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = random_batch(torch.Generator().manual_seed(1), [19, 5, 8], masked=6, pairs=2).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    # Autocast for CUDA does not act on what ttsem lets pass for a GPU's tensors: they are a CPU's.
    as_on_gpu = torch.autocast("cpu", dtype, enabled=ON_CPU and dtype != torch.float32)
    with use_backend(backend), as_on_gpu:
        results = TrainingStep(model, optimizer, clip=1e9, compute_dtype=dtype)([batch], 1.0)
    found = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    return found | {"losses": results.sums[:2]}


# The interpreter's tl.dot has no bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16, torch.float16] if DEVICE == "cuda" else [])])
def test_tiny(dtype):
    ours, theirs = step("triton", dtype), step("reference", dtype)
    oracle = step("reference", torch.float32, parameters=torch.float64)
    assert oracle["losses"].isfinite().all()
    for name, expected in oracle.items():
        assert_as_good_as_torch(ours[name], expected, theirs[name], name, roundings=4)
