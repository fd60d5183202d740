"""300 steps of mini in bf16, beside Transformers in bf16 and in float32: the distance of the losses from float32."""

import pytest
import torch
from oracle import DEVICE

from fusebert.bench.measure.settings import ParityOptions
from fusebert.bench.steps.parity import run


@pytest.mark.skipif(DEVICE != "cuda", reason="the rule compares means over many steps: a GPU's work")
def test_ours_is_no_farther_from_float32_than_twice_transformers():
    pytest.importorskip("transformers")
    options = ParityOptions(model="mini", steps=300, tokens=8192, compute_dtype="bfloat16")
    result = run(options, torch.device(DEVICE))
    assert result.verdict.right, result.verdict
    assert [len(run.losses) for run in result.runs.values()] == [300] * 3
