"""The FLOPs formula against PyTorch's counter."""

import dataclasses

import pytest
import torch
from bert_cases import MICRO, with_slack
from steps import random_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusebert.kernels.attn import torch_path
from fusebert.model.batch import PackedBatch
from fusebert.model.config import BertConfig
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.step.flops import batch_flops, matmul_rate, matmul_words, train_flops

CONFIG = dataclasses.replace(MICRO, num_hidden_layers=3)


def example() -> PackedBatch:
    """A batch without slack and without spare rows."""
    return random_batch(torch.Generator().manual_seed(0), [20, 7, 32, 1], masked=5, pairs=4, slots=5)


def test_formula_is_what_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without slack and spare rows the model computes exactly what the formula counts.

    With plain attention, because PyTorch's fused attention recomputes in its backward, and without padding."""
    monkeypatch.setattr(torch_path, "WORTH_PADDING", 0)
    model = BertForPreTraining(CONFIG)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(example())
        (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    assert counter.get_total_flops() == batch_flops(CONFIG, example())


def test_slack_is_not_counted() -> None:
    without = batch_flops(CONFIG, example())
    for tokens, segments, masked in ((5, 0, 0), (77, 2, 3)):
        assert batch_flops(CONFIG, with_slack(example(), tokens, segments, masked)) == without


def test_base_costs_what_the_literature_says() -> None:
    """BERT-base, N = 128: 85 M parameters in the linears of the layers, so 6 · 85 M = 510 MFLOP a token."""
    config = BertConfig.preset("base", 30522)
    heads = {"masked": 0, "pairs": 0}
    full = train_flops(config, tokens=1, squared_lengths=0, read=1, read_by_length=0, **heads)
    assert abs(full - 509.6e6) < 0.1e6
    squared = 128 * 128
    attention = train_flops(config, tokens=0, squared_lengths=squared, read=0, read_by_length=squared, **heads) / 128
    assert abs(attention - 14.2e6) < 0.1e6


def test_reading_few_rows_of_the_last_layer_saves_what_the_design_says() -> None:
    """BERT-base with 15 % of the rows and one first token in 128: about 6 % of the layers' matrix products."""
    config = BertConfig.preset("base", 30522)
    sizes = {"tokens": 128, "squared_lengths": 128 * 128, "masked": 0, "pairs": 0}
    full = train_flops(config, read=128, read_by_length=128 * 128, **sizes)
    few = train_flops(config, read=20, read_by_length=20 * 128, **sizes)
    assert 0.05 < 1 - few / full < 0.07


def test_matmul_rate_is_a_rate() -> None:
    device = torch.device("cpu")
    assert 1e8 < matmul_rate(device, torch.float32, seconds=0.1) < 1e14
    assert matmul_words(device, torch.float32) == "1024³ float32 matrix product"
