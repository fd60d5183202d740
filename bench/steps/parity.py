"""The same training run by us and by Transformers: same initial weights, same batches, no dropout; losses and tokens/s.

In float32 the two are the same function, and every step's losses must agree to 1e-3. In bf16 each wanders from the
float32 run by its own rounding: with d = mean over the steps of |loss − loss₃₂| / loss₃₂, where loss₃₂ is Transformers'
float32 run on the same batches, ours must wander at most twice as far as Transformers' own bf16 run.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...model import BertConfig, PackedBatch, from_hf
from ...train.errors import UserError
from ...train.step.optim import make_optimizer
from ...train.step.step import TrainingStep
from ..measure.correctness import RIGHT_FACTOR
from ..measure.machine import environment, nvidia_smi
from ..measure.result import ParityResult, ParityRun, ParitySettings, ParityVerdict, write_result
from .batches import random_batches
from .transformers_step import TransformersStep, padded_examples, split_examples, transformers_bert

LR, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
FP32_TOLERANCE = 1e-3  # relative, at every step
UNTIMED_STEPS = 3  # compile and warm up


class _Trainer(NamedTuple):
    """How a contestant takes its batches (untimed), and a step on what it took; the step gives its loss."""

    prepare: Callable[[PackedBatch], Any]
    train: Callable[[Any], Tensor]


def _ours(hf: nn.Module, device: torch.device, dtype: torch.dtype) -> _Trainer:
    model = from_hf(hf).to(device)  # type: ignore[arg-type]
    step = TrainingStep(model, make_optimizer(model, LR, WEIGHT_DECAY), clip=CLIP, compute_dtype=dtype)

    def train(batch: PackedBatch) -> Tensor:
        sums = step([batch], LR).sums
        return sums[0] / batch.num_masked + sums[1] / batch.num_pairs

    return _Trainer(lambda batch: batch, train)


def _theirs(hf: nn.Module, dtype: torch.dtype) -> _Trainer:
    step = TransformersStep(copy.deepcopy(hf), lr=LR, weight_decay=WEIGHT_DECAY, clip=CLIP, compute_dtype=dtype)
    return _Trainer(lambda batch: split_examples(padded_examples(batch), 1, gather=False), step)


def _train(trainer: _Trainer, batches: list[PackedBatch], device: torch.device) -> ParityRun:
    """Losses of all steps; real tokens a second after the first few."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    prepared = [trainer.prepare(batch.to(device)) for batch in batches]
    losses: list[Tensor] = []
    begin = time.perf_counter()
    for i, batch in enumerate(prepared):
        if i == UNTIMED_STEPS:
            wait()
            begin = time.perf_counter()
        losses.append(trainer.train(batch))
    wait()
    elapsed = time.perf_counter() - begin
    tokens = sum(batch.num_tokens for batch in batches[UNTIMED_STEPS:])
    return ParityRun(tuple(torch.stack([x.double() for x in losses]).tolist()), tokens / elapsed)


def compare(
    losses: Sequence[float], oracle: Sequence[float], theirs: Sequence[float] | None, *, factor: float = RIGHT_FACTOR
) -> ParityVerdict:
    """Whether ``losses`` follow ``oracle`` as they must.

    Args:
        theirs: Transformers' losses at the same dtype, the allowance; None in float32, where 1e-3 a step is.
    """
    right = np.asarray(oracle)
    drift = np.abs(np.asarray(losses) - right) / right
    mean, largest = float(drift.mean()), float(drift.max())
    if theirs is None:
        return ParityVerdict(mean, largest, largest < FP32_TOLERANCE, allowed_largest_drift=FP32_TOLERANCE)
    allowed = factor * float((np.abs(np.asarray(theirs) - right) / right).mean())
    return ParityVerdict(mean, largest, mean <= allowed, allowed_mean_drift=allowed)


def run(
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    steps: int = 100,
    tokens: int = 16384,
    seqlen: int = 128,
    out: Path | None = None,
    show: Callable[[Any], None] = print,
) -> ParityResult:
    """Train both, show the comparison, and return (and write) it.

    Args:
        config: its dropout is switched off.
        dtype: of the matrix products (autocast over float32 weights).
        steps: more than 3.
        show: takes the environment, and the result.

    Raises:
        ValueError: a setting is out of range.
        UserError: Transformers is not installed.
    """
    if steps <= UNTIMED_STEPS:
        raise ValueError(f"steps must be above {UNTIMED_STEPS}, which are not timed; got {steps}")
    config = dataclasses.replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batches = random_batches(config.vocab_size, tokens, seqlen, steps, ragged=True)
    where = environment(device)
    show(where)
    torch.manual_seed(0)
    hf = transformers_bert(config, device)
    trainers: dict[str, Callable[[], _Trainer]] = {
        "fusebert": lambda: _ours(hf, device, dtype),
        "transformers": lambda: _theirs(hf, dtype),
    }
    if dtype != torch.float32:
        trainers["transformers float32"] = lambda: _theirs(hf, torch.float32)
    runs = {}
    for name, make in trainers.items():
        runs[name] = _train(make(), batches, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    ours, theirs = runs["fusebert"], runs["transformers"]
    if dtype == torch.float32:
        verdict = compare(ours.losses, theirs.losses, None)
    else:
        verdict = compare(ours.losses, runs["transformers float32"].losses, theirs.losses)
    result = ParityResult(
        environment=where,
        settings=ParitySettings(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            compute_dtype=str(dtype).removeprefix("torch."),
            steps=steps,
            tokens=tokens,
            seqlen=seqlen,
            ragged=True,
            dropout=0.0,
        ),
        runs=runs,
        verdict=verdict,
        speed_up=ours.tokens_per_s / theirs.tokens_per_s,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if out is not None:
        write_result(out, result)
    return result


def plot(result: ParityResult, path: Path) -> None:
    """The loss curves of a result in one plot, to ``path`` (PNG or what its ending says).

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plotting needs matplotlib: pip install matplotlib") from error
    settings = result.settings
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, MLM + NSP (nats)")
    for style, (name, run) in zip(("-", "--", ":"), result.runs.items(), strict=False):
        label = name if name.endswith("float32") else f"{name} {settings.compute_dtype}"
        axes.plot(range(1, 1 + len(run.losses)), run.losses, style, label=label, linewidth=1.5)
    axes.set_title(f"{settings.layers} layers of {settings.hidden_size}: same weights, same batches, no dropout")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
