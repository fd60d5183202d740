"""300 steps of mini in bf16 beside Transformers in bf16 and in float32: three loss curves, one plot."""

import pytest
import torch
from oracle import DEVICE

from fusebert.bench.measure.machine import environment
from fusebert.bench.measure.result import ParityResult, ParityRun, ParityVerdict
from fusebert.bench.measure.settings import ParityOptions, ParitySettings
from fusebert.bench.steps import parity as train_parity


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("fusebert", "transformers", "transformers float32")
    result = ParityResult(
        environment(torch.device("cpu")),
        ParitySettings(layers=4, hidden_size=256, compute_dtype="bfloat16"),
        {name: ParityRun((9.0, 8.5, 8.0), 1000.0) for name in names},
        ParityVerdict(0.0, 0.0, True),
        1.0,
    )
    train_parity.plot(result, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(DEVICE != "cuda", reason="the rule compares means over many steps: a GPU's work")
def test_ours_is_no_farther_from_float32_than_twice_transformers(tmp_path):
    pytest.importorskip("transformers")
    options = ParityOptions(model="mini", steps=300, tokens=8192, compute_dtype="bfloat16")
    result = train_parity.run(options, torch.device(DEVICE))
    assert result.verdict.right, result.verdict
    assert [len(run.losses) for run in result.runs.values()] == [300] * 3
    train_parity.plot(result, tmp_path / "losses.png")
