"""A real training run, ours against Transformers': loader, packing or padding, step; tokens a second and the loss.

All contestants start from the same weights and train on the same examples of a prepared corpus, in the same order, with
the same learning rate at the same step. Ours pays for its loader, whose batches are drawn as it trains; Transformers is
given batches padded ahead of time, as if a collator with workers to spare had made them. Real tokens alone count.

They take turns, so that what the machine does happens to all; each turn is a sample. The curves can be read both ways:
at the same step they must lie on each other but for the dropout masks, and at the same time, whoever has seen more text
is ahead. If ours gives another held-out loss than Transformers before training, it is wrong and does not train.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model import BertConfig, PackedBatch, from_hf
from ...train.batches.batch_maker import BatchMaker, fit_shape
from ...train.batches.dataset import PackedExamples, heldout_batches
from ...train.batches.loader import batches as packed_batches
from ...train.corpus.reader import Corpus
from ...train.errors import UserError
from ...train.run.evaluate import evaluate
from ...train.run.plan import LEARNING_RATES
from ...train.step.optim import make_optimizer
from ...train.step.step import TrainingStep
from ..measure.case import OURS, PEER
from ..measure.correctness import FAILED, RIGHT, UNCHECKED, WRONG, Verdict
from ..measure.machine import Clocks, environment, nvidia_smi
from ..measure.result import (
    CurvePoint,
    LossAtStep,
    TrainContestant,
    TrainResult,
    TrainSettings,
    TrainTime,
    write_result,
)
from ..measure.statistics import ratio
from ..measure.verify import one_line
from .parity import FP32_TOLERANCE
from .transformers_step import TransformersStep, padded_examples, split_examples, transformers_bert, transformers_loss

WEIGHT_DECAY, CLIP = 0.01, 1.0
WARMUP_STEPS = 100  # of the learning rate, which then stays
UNTIMED_STEPS = 4  # compile, fill the allocator's cache; they train all the same
TURNS = 8
HELDOUT_TOKENS, HELDOUT_BATCH = 32768, 4096
MOST_MICRO_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, on what.

    Attributes:
        data: a prepared corpus.
        model: a preset.
        tokens: T, token slots of a batch, which is a step.
        seqlen: the longest segment.
        dropout: hidden and attention dropout probability.
        compiled: also Transformers under torch.compile.
        workers: processes that make our batches; 0 makes them between the steps.
        minutes: of training, all contestants together; compiling and padding come on top.
    """

    data: Path
    model: str
    tokens: int
    seqlen: int
    dropout: float = 0.1
    compiled: bool = False
    workers: int = 0
    minutes: float = 3.0


@dataclasses.dataclass
class _Trainer:
    """A contestant in training.

    Attributes:
        prepare: told, untimed, how many steps the next turn takes.
        step: takes the learning rate; gives the loss (MLM + NSP, on the device) and the real tokens of the batch.
        heldout: the loss on held-out batches, mean of each batch's.
        losses: of every step. curve: after each turn, how far it is. us_per_token: of each turn.
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
    model = from_hf(hf).to(device).train()  # type: ignore[arg-type]
    step = TrainingStep(model, make_optimizer(model, 0.0, WEIGHT_DECAY), clip=CLIP, compute_dtype=dtype)

    def train(lr: float) -> tuple[Tensor, int]:
        batch = next(batches)
        sums = step([batch], lr).sums
        return sums[0] / max(1, batch.num_masked) + sums[1] / max(1, batch.num_pairs), batch.num_tokens

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
    called: Any = torch.compile(model) if compiled else model
    step = TransformersStep(called, lr=0.0, weight_decay=WEIGHT_DECAY, clip=CLIP, compute_dtype=dtype)
    ready: list[tuple[dict[str, Tensor], int]] = []
    parts = 1

    def prepare(steps: int) -> None:
        for batch in (next(batches) for _ in range(steps - len(ready))):
            ready.append((padded_examples(batch), batch.num_tokens))

    def train(lr: float) -> tuple[Tensor, int]:
        """In as many micro-batches as the memory asks for: a batch that fits ours may not fit Transformers' logits."""
        nonlocal parts
        for group in step.optimizer.param_groups:
            group["lr"] = lr
        examples, tokens = ready.pop(0)
        on_device = {name: x.to(device, non_blocking=True) for name, x in examples.items()}
        while True:
            try:
                return step(split_examples(on_device, parts, gather=False)), tokens
            except torch.OutOfMemoryError:
                if 2 * parts > min(MOST_MICRO_BATCHES, len(on_device["input_ids"])):
                    raise
            parts *= 2
            step.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

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
    """``steps`` steps; seconds a step. The rate rises over the first steps, whatever the run's length."""
    trainer.prepare(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    losses, tokens = [], 0
    begin = time.perf_counter()
    for number in range(len(trainer.losses), len(trainer.losses) + steps):
        loss, count = trainer.step(lr * min(1.0, (number + 1) / WARMUP_STEPS))
        losses.append(loss.detach())
        tokens += count
    trainer.losses += torch.stack(losses).tolist()  # waits
    seconds = time.perf_counter() - begin
    if device.type == "cuda":
        trainer.peak_bytes = max(trainer.peak_bytes, torch.cuda.max_memory_allocated(device) - held)
    trainer.tokens += tokens
    if timed:
        trainer.seconds += seconds
        trainer.us_per_token.append(1e6 * seconds / tokens)
        trainer.curve.append(
            CurvePoint(trainer.seconds, len(trainer.losses), trainer.tokens, math.fsum(trainer.losses[-steps:]) / steps)
        )
    return seconds / steps


def _train(trainers: list[_Trainer], settings: Settings, lr: float, device: torch.device) -> None:
    """All untimed steps, then the turns. Who raises is out; the others go on."""
    steps: dict[str, int] = {}
    racing = list(trainers)
    turn_seconds = 60 * settings.minutes / (TURNS * len(racing))
    for turn in range(-1, TURNS):
        for trainer in list(racing if turn % 2 else reversed(racing)):
            try:
                if turn < 0:
                    _turn(trainer, UNTIMED_STEPS - 1, lr, device, timed=False)
                    once = _turn(trainer, 1, lr, device, timed=False)
                    steps[trainer.name] = max(1, round(turn_seconds / once))
                else:
                    _turn(trainer, steps[trainer.name], lr, device, timed=True)
            except Exception as error:  # does not fit, say
                trainer.verdict = Verdict(FAILED, detail=one_line(error))
                trainer.us_per_token.clear()
                racing.remove(trainer)
        gc.collect()


def run(
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    out: Path | None = None,
    show: Callable[[Any], None] = print,
) -> TrainResult:
    """Train all contestants, show the comparison, and return (and write) it.

    Args:
        dtype: of the matrix products (autocast over float32 weights); float32 for none.
        show: takes the environment, and the result.

    Raises:
        ValueError: a setting is out of range.
        CorpusError: ``settings.data`` is no sound corpus.
        UserError: Transformers is not installed, or the held-out text is too short.
    """
    begin = time.monotonic()
    corpus = Corpus.open(settings.data)
    config = BertConfig.preset(
        settings.model,
        corpus.vocab_size,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        max_position_embeddings=max(512, settings.seqlen),
    )
    split = corpus.split("train")
    shape = fit_shape(split, settings.tokens, settings.seqlen)
    examples = PackedExamples(BatchMaker(corpus, "train", shape), seed=0)
    few = fit_shape(split, max(settings.seqlen, HELDOUT_BATCH) // 8 * 8, settings.seqlen)
    heldout = heldout_batches(BatchMaker(corpus, "heldout", few), tokens=HELDOUT_TOKENS)
    heldout = [batch for batch in heldout if batch.num_masked and batch.num_pairs]
    if not heldout:
        raise UserError(
            f"--data {settings.data}: its held-out text is too short to compare losses on: prepare more text"
        )
    where = environment(device)
    show(where)
    torch.manual_seed(0)
    hf = transformers_bert(config, device)

    def batches() -> Iterator[PackedBatch]:
        return packed_batches(examples, num_workers=settings.workers, pin_memory=device.type == "cuda")

    trainers = [_ours(hf, batches(), heldout, device, dtype)]
    for compiled in (False, True) if settings.compiled else (False,):
        trainers.append(_theirs(hf, batches(), heldout, device, dtype, compiled=compiled))
    ours, theirs = trainers[:2]
    ours.verdict = _same_before_training(ours, theirs, dtype)
    lr = LEARNING_RATES[settings.model]
    with Clocks(device) as clocks:
        _train([t for t in trainers if t.verdict.may_be_timed], settings, lr, device)
    result = TrainResult(
        environment=where,
        settings=TrainSettings(
            **dataclasses.asdict(settings)
            | {"data": settings.data.name, "compute_dtype": str(dtype).removeprefix("torch.")}
            | {"lr": lr, "vocab_size": corpus.vocab_size}
        ),
        unigram_entropy=corpus.unigram_entropy,
        contestants=_rows(trainers),
        clocks=clocks.found,
        seconds=time.monotonic() - begin,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if out is not None:
        write_result(out, result)
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


def ours_that_are_not_right(result: TrainResult) -> list[str]:
    """What fails a run: ours wrong, or unable to train."""
    return [
        f"{row.name} is {row.verdict.status} ({row.verdict.detail})"
        for row in result.contestants
        if row.role == OURS and row.verdict.status != RIGHT
    ]
