"""The same training run by us and by Transformers: same initial weights, same batches, no dropout; losses and tokens/s.

In float32 the two are the same function, and the losses of every step must agree to 1e-3. In bf16 both differ from the
float32 run by their rounding. With d = mean over the steps of |loss − loss₃₂| / loss₃₂, where loss₃₂ is Transformers'
float32 run on the same batches, our d may be at most twice that of Transformers' bf16 run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...model import PackedBatch
from ...train.step.stopwatch import Stopwatch
from ..measure.correctness import RIGHT_FACTOR
from ..measure.machine import environment, nvidia_smi
from ..measure.memory import release_memory
from ..measure.result import ParityResult, ParityRun, ParityVerdict, write_result
from ..measure.settings import ParityOptions, ParitySettings, settings_of
from .batches import random_batches
from .contestants import FP32_TOLERANCE, LR, our_loss, our_model, our_step, preset, their_step
from .transformers_step import padded_examples, transformers_bert

UNTIMED_STEPS = 3  # compile and warm up


def _train(train: Callable[[Any], Tensor], batches: list[Any], device: torch.device) -> tuple[tuple[float, ...], float]:
    """Losses of all steps; seconds of the timed ones."""
    losses = [train(batch) for batch in batches[:UNTIMED_STEPS]]
    watch = Stopwatch(device)
    losses += [train(batch) for batch in batches[UNTIMED_STEPS:]]
    watch.stop()
    return tuple(torch.stack([x.double() for x in losses]).tolist()), watch.seconds()


def _train_ours(hf: nn.Module, batches: list[PackedBatch], device: torch.device, dtype: torch.dtype) -> Any:
    step = our_step(our_model(hf, device), dtype)
    return _train(lambda batch: our_loss(step([batch], LR).sums, batch), batches, device)


def _train_theirs(hf: nn.Module, batches: list[PackedBatch], device: torch.device, dtype: torch.dtype) -> Any:
    step = their_step(copy.deepcopy(hf), dtype)
    return _train(step.train, [padded_examples(batch) for batch in batches], device)


def compare(
    losses: Sequence[float], oracle: Sequence[float], theirs: Sequence[float] | None, *, factor: float = RIGHT_FACTOR
) -> ParityVerdict:
    """Whether ``losses`` follow ``oracle``.

    Args:
        theirs: Transformers' losses at the same dtype, which give the allowance; None in float32, where it is 1e-3.
    """
    right = np.asarray(oracle)
    drift = np.abs(np.asarray(losses) - right) / right
    mean, largest = float(drift.mean()), float(drift.max())
    if theirs is None:
        return ParityVerdict(mean, largest, largest < FP32_TOLERANCE, allowed_largest_drift=FP32_TOLERANCE)
    allowed = factor * float((np.abs(np.asarray(theirs) - right) / right).mean())
    return ParityVerdict(mean, largest, mean <= allowed, allowed_mean_drift=allowed)


def run(options: ParityOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> ParityResult:
    """Train both, show the comparison, and return (and write) it.

    Args:
        options: resolved for the device; more than 3 steps.
        show: takes the environment, and the result.

    Raises:
        ValueError: a setting is out of range.
        UserError: Transformers is not installed.
    """
    steps, dtype = options.steps, getattr(torch, options.compute_dtype)
    if steps <= UNTIMED_STEPS:
        raise ValueError(f"steps must be above {UNTIMED_STEPS}, which are not timed; got {steps}")
    config = preset(options.model, options.vocab_size, seqlen=options.seqlen, dropout=0.0)
    drawn = random_batches(config.vocab_size, options.tokens, options.seqlen, steps, ragged=True)
    tokens = sum(batch.num_tokens for batch in drawn[UNTIMED_STEPS:])
    batches = [batch.to(device) for batch in drawn]
    where = environment(device)
    show(where)
    torch.manual_seed(0)
    hf = transformers_bert(config, device)
    contestants = {"fusebert": (_train_ours, dtype), "transformers": (_train_theirs, dtype)}
    if dtype != torch.float32:
        contestants["transformers float32"] = _train_theirs, torch.float32
    runs = {}
    for name, (train, compute_dtype) in contestants.items():
        losses, seconds = train(hf, batches, device, compute_dtype)
        runs[name] = ParityRun(losses, tokens / seconds)
        release_memory(device)

    ours, theirs = runs["fusebert"], runs["transformers"]
    if dtype == torch.float32:
        verdict = compare(ours.losses, theirs.losses, None)
    else:
        verdict = compare(ours.losses, runs["transformers float32"].losses, theirs.losses)
    result = ParityResult(
        environment=where,
        settings=settings_of(ParitySettings, options, layers=config.num_hidden_layers, hidden_size=config.hidden_size),
        runs=runs,
        verdict=verdict,
        speed_up=ours.tokens_per_s / theirs.tokens_per_s,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result
