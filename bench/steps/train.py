"""A real training run, ours against Transformers': loader, packing or padding, step; tokens a second and the loss.

All contestants start from the same weights and train on the same examples of a prepared corpus, in the same order, with
the same learning rate at the same step. Our time includes the loader, which makes batches during the training.
Transformers gets batches that were padded ahead of time, as from a collator with enough workers. Tokens are real ones.

The contestants take turns, so that changes of the machine's speed affect all of them; each turn is a sample. At the
same step the loss curves must agree but for the dropout masks; at the same time, the faster contestant has seen more
text. If ours gives another held-out loss than Transformers before training, it is wrong and does not train.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model import PackedBatch
from ...train.batches.batch_maker import BatchMaker, fit_shape
from ...train.batches.dataset import PackedExamples, heldout_batches
from ...train.batches.loader import batches as packed_batches
from ...train.corpus.reader import Corpus
from ...train.errors import UserError
from ...train.run.evaluate import evaluate
from ...train.run.plan import LEARNING_RATES
from ...train.step.stopwatch import Stopwatch
from ..measure.case import OURS, PEER
from ..measure.correctness import FAILED, RIGHT, UNCHECKED, WRONG, Verdict
from ..measure.machine import Clocks, environment, nvidia_smi
from ..measure.memory import PeakMemory, release_memory
from ..measure.result import (
    CurvePoint,
    LossAtStep,
    TrainContestant,
    TrainResult,
    TrainTime,
    write_result,
)
from ..measure.settings import TrainOptions, TrainSettings, settings_of
from ..measure.statistics import ratio
from ..measure.verify import one_line
from .contestants import FP32_TOLERANCE, our_loss, our_model, our_step, preset, their_step
from .transformers_step import Examples, padded_examples, transformers_bert, transformers_loss

WARMUP_STEPS = 100  # the learning rate rises over these and then stays
UNTIMED_STEPS = 4  # compile and fill the allocator's cache; they train like the others
TURNS = 8
HELDOUT_TOKENS, HELDOUT_BATCH = 32768, 4096


@dataclasses.dataclass
class _Trainer:
    """A contestant in training.

    Attributes:
        prepare: gets, untimed, the number of steps of the next turn.
        step: takes the learning rate; gives the loss (MLM + NSP, on the device) and the real tokens of the batch.
        heldout: the loss on held-out batches, mean of each batch's.
        losses: of every step. curve: progress after each turn. us_per_token: of each turn.
    """

    name: str
    role: str
    prepare: Callable[[int], None]
    step: Callable[[float], tuple[Tensor, int]]
    heldout: Callable[[], float]
    verdict: Verdict
    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    curve: list[CurvePoint] = dataclasses.field(default_factory=list)
    us_per_token: list[float] = dataclasses.field(default_factory=list)


def _ours(
    hf: nn.Module, batches: Iterator[PackedBatch], heldout: list[PackedBatch], device: torch.device, dtype: torch.dtype
) -> _Trainer:
    model = our_model(hf, device)
    step = our_step(model, dtype)

    def train(lr: float) -> tuple[Tensor, int]:
        batch = next(batches)
        return our_loss(step([batch], lr).sums, batch), batch.num_tokens

    def loss() -> float:
        found = [evaluate(model, [batch], dtype) for batch in heldout]
        return math.fsum(x.mlm_loss + (x.nsp_loss or 0.0) for x in found) / len(found)

    return _Trainer("fusebert", OURS, lambda steps: None, train, loss, Verdict(RIGHT))


def _theirs(
    hf: nn.Module,
    batches: Iterator[PackedBatch],
    heldout: list[PackedBatch],
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> _Trainer:
    model = copy.deepcopy(hf)
    step = their_step(model, dtype, compiled=compiled)
    ready: list[tuple[Examples, int]] = []

    def prepare(steps: int) -> None:
        for batch in (next(batches) for _ in range(steps - len(ready))):
            ready.append((padded_examples(batch), batch.num_tokens))

    def train(lr: float) -> tuple[Tensor, int]:
        examples, tokens = ready.pop(0)
        return step.train({name: x.to(device, non_blocking=True) for name, x in examples.items()}, lr), tokens

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            found = [transformers_loss(model, padded_examples(batch.to(device)), dtype) for batch in heldout]
        model.train()
        return float(torch.stack(found).mean())

    name = "transformers, torch.compile" if compiled else "transformers"
    verdict = Verdict(UNCHECKED, detail="the compiled form of a checked model") if compiled else Verdict(RIGHT)
    return _Trainer(name, PEER, prepare, train, loss, verdict)


def _same_before_training(ours: _Trainer, theirs: _Trainer, dtype: torch.dtype) -> Verdict:
    """Whether both give the same held-out loss, to 1e-3 in float32, to a rounding of the compute dtype otherwise."""
    found, right = ours.heldout(), theirs.heldout()
    allowed = FP32_TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
    error = abs(found - right) / right
    if error <= allowed:
        return Verdict(RIGHT, {"loss": error})
    detail = f"held-out loss {found:.5f} before training, Transformers' is {right:.5f}; {allowed:.1e} of it is allowed"
    return Verdict(WRONG, {"loss": error}, detail=detail)


def _turn(trainer: _Trainer, steps: int, lr: float, device: torch.device, *, timed: bool) -> float:
    """``steps`` steps; returns seconds a step."""
    trainer.prepare(steps)
    losses, tokens = [], 0
    with PeakMemory(device) as memory:
        watch = Stopwatch(device)
        for number in range(len(trainer.losses), len(trainer.losses) + steps):
            loss, count = trainer.step(lr * min(1.0, (number + 1) / WARMUP_STEPS))
            losses.append(loss.detach())
            tokens += count
        watch.stop()
    seconds = watch.seconds()
    trainer.losses += torch.stack(losses).tolist()
    trainer.peak_bytes = max(trainer.peak_bytes, memory.bytes or 0)
    trainer.tokens += tokens
    if timed:
        trainer.seconds += seconds
        trainer.us_per_token.append(1e6 * seconds / tokens)
        trainer.curve.append(
            CurvePoint(trainer.seconds, len(trainer.losses), trainer.tokens, math.fsum(trainer.losses[-steps:]) / steps)
        )
    return seconds / steps


def _train(trainers: list[_Trainer], minutes: float, lr: float, device: torch.device) -> None:
    """All untimed steps, then the turns. A contestant that raises is out; the others go on."""
    steps: dict[str, int] = {}
    running = list(trainers)
    turn_seconds = 60 * minutes / (TURNS * len(running))
    for turn in range(-1, TURNS):
        for trainer in list(running if turn % 2 else reversed(running)):
            try:
                if turn < 0:
                    _turn(trainer, UNTIMED_STEPS - 1, lr, device, timed=False)
                    once = _turn(trainer, 1, lr, device, timed=False)
                    steps[trainer.name] = max(1, round(turn_seconds / once))
                else:
                    _turn(trainer, steps[trainer.name], lr, device, timed=True)
            except Exception as error:  # for example: out of memory
                trainer.verdict = Verdict(FAILED, detail=one_line(error))
                trainer.us_per_token.clear()
                running.remove(trainer)
        release_memory(device)


def run(options: TrainOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> TrainResult:
    """Train all contestants, show the comparison, and return (and write) it.

    Args:
        options: resolved for the device.
        show: takes the environment, and the result.

    Raises:
        ValueError: a setting is out of range.
        CorpusError: ``options.data`` is not a corpus, or is damaged.
        UserError: Transformers is not installed, or the held-out text is too short.
    """
    begin = time.monotonic()
    dtype, seqlen = getattr(torch, options.compute_dtype), options.seqlen
    corpus = Corpus.open(Path(options.data))
    config = preset(options.model, corpus.vocab_size, seqlen=seqlen, dropout=options.dropout)
    split = corpus.split("train")
    shape = fit_shape(split, options.tokens, seqlen)
    examples = PackedExamples(BatchMaker(corpus, "train", shape), seed=0)
    few = fit_shape(split, max(seqlen, HELDOUT_BATCH) // 8 * 8, seqlen)
    heldout = heldout_batches(BatchMaker(corpus, "heldout", few), tokens=HELDOUT_TOKENS)
    heldout = [batch for batch in heldout if batch.num_masked and batch.num_pairs]
    if not heldout:
        raise UserError(
            f"--data {options.data}: its held-out text is too short to compare losses on: prepare more text"
        )
    where = environment(device)
    show(where)
    torch.manual_seed(0)
    hf = transformers_bert(config, device)

    def batches() -> Iterator[PackedBatch]:
        return packed_batches(examples, num_workers=options.workers or 0, pin_memory=device.type == "cuda")

    trainers = [_ours(hf, batches(), heldout, device, dtype)]
    for compiled in (False, True) if options.compiled else (False,):
        trainers.append(_theirs(hf, batches(), heldout, device, dtype, compiled=compiled))
    ours, theirs = trainers[:2]
    ours.verdict = _same_before_training(ours, theirs, dtype)
    lr = LEARNING_RATES[options.model]
    with Clocks(device) as clocks:
        _train([t for t in trainers if t.verdict.may_be_timed], options.minutes, lr, device)
    result = TrainResult(
        environment=where,
        settings=settings_of(TrainSettings, options, data=Path(options.data).name, lr=lr, vocab_size=corpus.vocab_size),
        unigram_entropy=corpus.unigram_entropy,
        contestants=_rows(trainers),
        clocks=clocks.found,
        seconds=time.monotonic() - begin,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result


def _rows(trainers: list[_Trainer]) -> list[TrainContestant]:
    """The contestants. The loss at the same step is the mean of the last quarter of the steps all have made."""
    timed = [t for t in trainers if t.us_per_token]
    common = min((len(t.losses) for t in timed), default=0)
    last = max(1, common // 4)
    ours = next((t for t in timed if t.role == OURS), None)
    rows = []
    for t in trainers:
        found = None
        if t in timed:
            found = TrainTime(
                tokens_per_s=1e6 / sorted(t.us_per_token)[len(t.us_per_token) // 2],
                us_per_token=tuple(t.us_per_token),
                ratio_to_ours=ratio(t.us_per_token, ours.us_per_token) if ours else None,
                steps=len(t.losses),
                tokens=t.tokens,
                loss_at_same_step=LossAtStep(common, math.fsum(t.losses[common - last : common]) / last),
                heldout_loss=t.heldout(),
                peak_bytes=t.peak_bytes or None,
                losses=tuple(t.losses),
                curve=tuple(t.curve),
            )
        rows.append(TrainContestant(t.name, t.role, t.verdict, found))
    return rows
