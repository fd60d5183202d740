"""The FLOPs formula against PyTorch's own counter, operator by operator."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusebert.model.batch import IGNORE, PackedBatch
from fusebert.model.config import BertConfig
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.step.flops import batch_flops, matmul_rate, matmul_words, train_flops

CONFIG = BertConfig(
    vocab_size=100,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=80,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=32,
)


def batch(lengths: list[int], slack: int, seqlen: int) -> PackedBatch:
    pieces = [seqlen] * (slack // seqlen) + [slack % seqlen] * bool(slack % seqlen)
    tokens = sum(lengths) + slack
    return PackedBatch(
        input_ids=torch.arange(tokens) % 100,
        token_type_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in [*lengths, *pieces]]),
        cu_seqlens=torch.tensor([0, *lengths, *pieces]).cumsum(0).to(torch.int32),
        masked_positions=torch.arange(5),
        masked_labels=torch.arange(5),
        nsp_labels=torch.tensor([0] * len(lengths) + [IGNORE] * len(pieces)),
        max_seqlen=seqlen,
        num_tokens=sum(lengths),
        num_masked=5,
        num_pairs=len(lengths),
    )


def test_formula_is_what_pytorch_counts() -> None:
    """Without slack and spare rows the model computes nothing but what the formula counts. (PyTorch's fused attention
    recomputes in its backward, so the count is taken with the plain one.)"""
    model = BertForPreTraining(CONFIG)
    example = batch([20, 7, 32, 1], slack=0, seqlen=32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(example)
        (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    assert counter.get_total_flops() == batch_flops(CONFIG, example)


def test_slack_is_not_counted() -> None:
    lengths = [20, 7, 32, 1]
    without = batch_flops(CONFIG, batch(lengths, slack=0, seqlen=32))
    assert batch_flops(CONFIG, batch(lengths, slack=5, seqlen=32)) == without
    assert batch_flops(CONFIG, batch(lengths, slack=77, seqlen=32)) == without


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
    """BERT-base: 15 % of the rows and a first token in 128, about 6 % of the layers' matrix work."""
    config = BertConfig.preset("base", 30522)
    sizes = {"tokens": 128, "squared_lengths": 128 * 128, "masked": 0, "pairs": 0}
    full = train_flops(config, read=128, read_by_length=128 * 128, **sizes)
    few = train_flops(config, read=20, read_by_length=20 * 128, **sizes)
    assert 0.05 < 1 - few / full < 0.07


def test_matmul_rate_is_a_rate() -> None:
    device = torch.device("cpu")
    assert 1e8 < matmul_rate(device, torch.float32, seconds=0.1) < 1e14
    assert matmul_words(device, torch.float32) == "1024³ float32 matrix product"
