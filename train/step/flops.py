"""The floating-point operations of a training step, and the device's rate of matrix products: the two parts of MFU.

Counted are the matrix products of the model on real tokens, without the slack of a packed batch and spare masked rows.
A multiply-add counts 2. The backward costs twice the forward: one product for the gradient of each operand.

    linears     6 · tokens · (L − 1) · (4H² + 2HI)        Q, K, V, output; both feed-forward layers
    attention   12 · Σ_s n_s² · (L − 1) · H               QKᵀ and PV on segments of n_s tokens
    last layer  6 · tokens · 2H² + 6 · read · (2H² + 2HI)     K, V for all rows; the rest for the rows read after it
                + 12 · Σ_s read_s n_s · H                 (masked positions and first tokens)
    MLM head    6 · masked · (H² + HV)                    transform, decoder
    NSP head    6 · pairs · (H² + 2H)                     pooler, classifier

MFU (model FLOPs utilisation, Chowdhery et al. 2022) is this count, divided by the time of the step and by the rate of a
large matrix product on the same device. The rate is measured, not taken from a data sheet.
"""

from __future__ import annotations

import statistics

import torch

from ...model.batch import IGNORE, PackedBatch
from ...model.config import BertConfig
from .stopwatch import Stopwatch

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the operands of `matmul_rate`


def train_flops(
    config: BertConfig, *, tokens: int, squared_lengths: int, read: int, read_by_length: int, masked: int, pairs: int
) -> int:
    """FLOPs of forward and backward.

    Args:
        tokens: real tokens.
        squared_lengths: Σ n_s² over the segments.
        read: rows read after the last layer, Σ read_s.
        read_by_length: Σ read_s · n_s over the segments.
        masked: labelled positions.
        pairs: labelled pairs.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers - 1
    linears = 6 * tokens * layers * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 12 * squared_lengths * layers * hidden
    last = 6 * tokens * 2 * hidden * hidden + 6 * read * (2 * hidden * hidden + 2 * hidden * inner)
    last += 12 * read_by_length * hidden
    mlm_head = 6 * masked * (hidden * hidden + hidden * config.vocab_size)
    nsp_head = 6 * pairs * (hidden * hidden + 2 * hidden)
    return linears + attention + last + mlm_head + nsp_head


def batch_flops(config: BertConfig, batch: PackedBatch) -> int:
    """`train_flops` of a packed batch on the CPU."""
    bounds = batch.cu_seqlens.long()
    # Exclude the segments of the slack: they start after the real tokens.
    lengths = bounds.diff() * (bounds[:-1] < batch.num_tokens)
    masked = batch.masked_positions[batch.masked_labels != IGNORE]
    segments = torch.bucketize(masked, bounds[1:], right=True)
    read = torch.bincount(segments, minlength=lengths.numel()) + (lengths > 0)
    return train_flops(
        config,
        tokens=batch.num_tokens,
        squared_lengths=int(lengths.square().sum()),
        read=int(read.sum()),
        read_by_length=int((read * lengths).sum()),
        masked=batch.num_masked,
        pairs=batch.num_pairs,
    )


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product: the median over products queued back to back.

    The operands are random, because products of zeros run faster. `MATMUL_SIZE` gives their size: on a GPU it is large
    enough to reach the peak rate and to make the launch time and the L2 cache irrelevant; on a CPU it keeps the
    measurement short.

    Args:
        dtype: of both operands.
        seconds: approximate duration of the measurement; at least five products are timed.
    """
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def product() -> Stopwatch:
        watch = Stopwatch(device)
        torch.mm(a, b)
        watch.stop()
        return watch

    product().seconds()  # warm up: load the kernel
    repeats = min(60, max(5, round(seconds / product().seconds())))
    watches = [product() for _ in range(repeats)]  # queued without a synchronisation
    return 2 * n**3 / statistics.median(watch.seconds() for watch in watches)


def matmul_words(device: torch.device, dtype: torch.dtype) -> str:
    """What `matmul_rate` measures, for example ``"8192³ bfloat16 matrix product"``."""
    return f"{MATMUL_SIZE[device.type]}³ {str(dtype).removeprefix('torch.')} matrix product"


def rate_words(flops_per_second: float) -> str:
    """For example ``"53.1 GFLOP/s"``; in TFLOP/s from 1 TFLOP/s."""
    if flops_per_second < 1e12:
        return f"{flops_per_second / 1e9:.3g} GFLOP/s"
    return f"{flops_per_second / 1e12:.3g} TFLOP/s"
