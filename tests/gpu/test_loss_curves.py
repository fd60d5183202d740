"""300 steps of mini in bf16 beside Transformers in bf16 and in float32: three loss curves, one plot."""

import pytest
import torch
from oracle import DEVICE

from fusebert.bench.steps import parity as train_parity
from fusebert.model import BertConfig


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {name: {"losses": [9.0, 8.5, 8.0]} for name in ("fusebert", "transformers", "transformers float32")}
    settings = {"layers": 4, "hidden_size": 256, "compute_dtype": "bfloat16"}
    train_parity.plot({"runs": runs, "settings": settings}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(DEVICE != "cuda", reason="the rule compares means over many steps: a GPU's work")
def test_ours_is_no_farther_from_float32_than_twice_transformers(tmp_path):
    pytest.importorskip("transformers")
    config = BertConfig.preset("mini", 30522)
    result = train_parity.run(config, torch.device(DEVICE), torch.bfloat16, steps=300, tokens=8192, seqlen=128)
    assert result["verdict"]["right"], result["verdict"]
    assert [len(run["losses"]) for run in result["runs"].values()] == [300] * 3
    train_parity.plot(result, tmp_path / "losses.png")
