"""One whole training step, ours against Transformers', on the same examples: forward, backward, clip, AdamW.

All contestants start from the same weights. Before anything is timed, the gradient of every parameter on a few of the
examples, dropout off, is compared with Transformers' in float64 by the rule of `verify`; what is wrong is not timed.
Then steps alternate between the contestants (see `timing`). Tokens a second counts real tokens alone, for everybody;
so does MFU, over the matrix-product rate measured in the same run. At the end our step is profiled operator by
operator.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model import BertConfig, BertForPreTraining, PackedBatch, from_hf, pack_padded
from ...model.fp8 import fp8_obstacle, use_fp8
from ...model.hf import parameter_names
from ...train.batches.batch_maker import BatchMaker, fit_shape
from ...train.batches.dataset import PackedExamples
from ...train.batches.loader import batches as corpus_batches
from ...train.corpus.reader import Corpus
from ...train.step.flops import batch_flops
from ...train.step.graphs import WARMUP_STEPS
from ...train.step.optim import make_optimizer
from ...train.step.step import TrainingStep, autocast
from ..measure.case import OURS, PEER
from ..measure.ceilings import measure_ceilings
from ..measure.correctness import FAILED, RIGHT, UNCHECKED, WRONG, Verdict, status
from ..measure.machine import environment, nvidia_smi
from ..measure.result import StepBatch, StepContestant, StepResult, StepSettings, StepTime, write_result
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave
from ..measure.verify import one_line
from .batches import random_batches
from .profile import profile_step
from .transformers_step import (
    Examples,
    MaskedRowsOnly,
    TransformersStep,
    padded_examples,
    split_examples,
    transformers_bert,
    transformers_loss,
)

LR, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
BATCHES = 2  # a burst walks through all, so that every burst has the same tokens
CHECKED_SEQUENCES = 8
MOST_MICRO_BATCHES = 16
MOST_SECONDS = 40.0  # of measuring, however much time there is


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step is made of.

    Attributes:
        model: a preset.
        tokens: T, token slots of a batch.
        seqlen: the longest segment.
        ragged: lengths vary up to ``seqlen`` (see `batches`), else all are ``seqlen``.
        dropout: hidden and attention dropout probability.
        compiled: race compiled contestants too.
        vocab_size: BERT's; with ``data`` the corpus's.
        data: a prepared corpus, whose examples are then used (their lengths, ``ragged`` or not) in place of random
        ones.
    """

    model: str
    tokens: int
    seqlen: int
    ragged: bool = False
    dropout: float = 0.1
    compiled: bool = False
    vocab_size: int = 30522
    data: Path | None = None

    def config(self) -> BertConfig:
        """The preset's config, with positions enough for ``seqlen``."""
        return BertConfig.preset(
            self.model,
            self.vocab_size,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=max(512, self.seqlen),
        )


@dataclasses.dataclass(frozen=True)
class _Contestant:
    """A model and how it steps. ``prepare()`` builds the step, which takes the number of the batch, untimed."""

    name: str
    role: str
    check: Callable[[], Verdict]
    prepare: Callable[[], tuple[Callable[[int], Any], int]]  # (step, micro-batches)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """In float64, zeros where the loss does not reach."""
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad).double() for name, p in model.named_parameters()}


class _GradientCheck:
    """Transformers' gradient in float64 on a few examples, and its error at the compute dtype: the allowance."""

    def __init__(self, hf: nn.Module, examples: Examples, layers: int, compute_dtype: torch.dtype) -> None:
        self.examples, self.compute_dtype = examples, compute_dtype
        self.names = parameter_names(layers)  # ours -> theirs, whose concatenation along the first axis it is
        oracle = self._of_theirs(copy.deepcopy(hf).double(), torch.float32, gather=False)
        self.oracle = {ours: torch.cat([oracle[part] for part in parts]) for ours, parts in self.names.items()}
        self.norm = torch.stack([x.norm() for x in self.oracle.values()]).norm()
        self.allowance = self._error(self._of_theirs(copy.deepcopy(hf), compute_dtype, gather=False))

    def _of_theirs(self, hf: nn.Module, compute_dtype: torch.dtype, *, gather: bool) -> dict[str, Tensor]:
        model = (MaskedRowsOnly(hf) if gather else hf).eval()  # type: ignore[arg-type]
        transformers_loss(model, split_examples(self.examples, 1, gather=gather)[0], compute_dtype).backward()
        return _gradients(hf)

    def _error(self, theirs: dict[str, Tensor]) -> float:
        found = {ours: torch.cat([theirs[part] for part in parts]) for ours, parts in self.names.items()}
        return self._error_of(found)

    def _error_of(self, found: dict[str, Tensor]) -> float:
        differences = [(found[name] - right).norm() for name, right in self.oracle.items()]
        return float(torch.stack(differences).norm() / self.norm)

    def _verdict(self, error: float) -> Verdict:
        versus = error / self.allowance
        if not math.isfinite(versus):
            return Verdict(WRONG, {"gradient": error}, detail="the gradient is not finite")
        found = status(versus)
        detail = "" if found == RIGHT else f"the gradient is {versus:.1f} times as far from float64 as Transformers'"
        return Verdict(found, {"gradient": error}, versus, detail)

    def theirs(self, hf: nn.Module, compute_dtype: torch.dtype, *, gather: bool) -> Verdict:
        """Judge a Transformers model (a copy of it: its gradients stay as they are)."""
        return self._verdict(self._error(self._of_theirs(copy.deepcopy(hf), compute_dtype, gather=gather)))

    def ours(self, model: BertForPreTraining) -> Verdict:
        """Judge our model."""
        batch = pack_padded(**self.examples)
        model = copy.deepcopy(model).eval()
        with autocast(batch.input_ids.device, self.compute_dtype):
            out = model(batch)
        (out.mlm_loss_sum / batch.num_masked + out.nsp_loss_sum / batch.num_pairs).backward()
        return self._verdict(self._error_of(_gradients(model)))


def _prepare_ours(
    model: BertForPreTraining, compiled: bool, graph: bool, batches: list[PackedBatch], dtype: torch.dtype
) -> Any:
    optimizer = make_optimizer(model, LR, WEIGHT_DECAY)
    step = TrainingStep(model, optimizer, clip=CLIP, compute_dtype=dtype, graph=graph, compiled=compiled)
    for i in range(WARMUP_STEPS + 1 if graph else 0):
        step([batches[i % len(batches)]], LR)
    return lambda i: step([batches[i % len(batches)]], LR), 1


def _prepare_theirs(
    model: nn.Module, compiled: bool, gather: bool, batches: list[PackedBatch], dtype: torch.dtype
) -> Any:
    """As many micro-batches as the memory asks for: a batch that fits ours may not fit Transformers' logits."""
    called: Any = MaskedRowsOnly(model) if gather else model  # type: ignore[arg-type]
    called = torch.compile(called) if compiled else called
    step = TransformersStep(called, lr=LR, weight_decay=WEIGHT_DECAY, clip=CLIP, compute_dtype=dtype)
    examples = [padded_examples(batch) for batch in batches]
    sequences = min(len(x["input_ids"]) for x in examples)
    parts = 1
    while True:
        try:
            micros = [split_examples(x, parts, gather=gather) for x in examples]
            step(micros[0])
            break
        except torch.OutOfMemoryError:
            if 2 * parts > min(MOST_MICRO_BATCHES, sequences):
                raise
        parts *= 2
        step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return lambda i: step(micros[i % len(micros)]), parts


def _contestants(
    settings: Settings, hf: nn.Module, batches: list[PackedBatch], check: _GradientCheck, dtype: torch.dtype
) -> Iterator[_Contestant]:
    """Ours first, then Transformers, as it is and helped by hand; then all compiled, which take longest to build."""
    device = batches[0].input_ids.device
    unchecked = Verdict(UNCHECKED, detail="the compiled form of a checked model")
    for compiled in (False, True) if settings.compiled else (False,):
        suffix = ", torch.compile" if compiled else ""
        for graph in (True, False) if device.type == "cuda" else (False,):  # as training does it by default comes first
            ours = from_hf(hf).to(device)  # type: ignore[arg-type]
            yield _Contestant(
                f"fusebert{suffix}{'' if graph or device.type != 'cuda' else ', no CUDA graph'}",
                OURS,
                lambda model=ours, compiled=compiled: unchecked if compiled else check.ours(model),
                lambda model=ours, compiled=compiled, graph=graph: _prepare_ours(
                    model, compiled, graph, batches, dtype
                ),
            )
        if not compiled and dtype == torch.bfloat16 and fp8_obstacle(device) is None:
            use_fp8(narrow := from_hf(hf).to(device))  # type: ignore[arg-type]
            yield _Contestant(
                "fusebert, fp8",
                OURS,
                lambda: Verdict(UNCHECKED, detail="fp8 is not held to bf16's rounding: compare loss curves"),
                lambda model=narrow: _prepare_ours(model, False, device.type == "cuda", batches, dtype),
            )
        for name, gather, weights in (
            ("transformers", False, torch.float32),
            ("transformers, masked rows only", True, torch.float32),
            ("transformers, bf16 weights", False, torch.bfloat16),
        ):
            if weights != torch.float32 and (compiled or dtype != weights):
                continue
            theirs = copy.deepcopy(hf).to(weights)
            compute = torch.float32 if weights == dtype else dtype  # weights of the compute dtype need no autocast
            yield _Contestant(
                name + suffix,
                PEER,
                lambda model=theirs, compiled=compiled, gather=gather, compute=compute: (
                    unchecked if compiled else check.theirs(model, compute, gather=gather)
                ),
                lambda model=theirs, compiled=compiled, gather=gather, compute=compute: _prepare_theirs(
                    model, compiled, gather, batches, compute
                ),
            )


def _peak_bytes(step: Callable[[int], Any], device: torch.device) -> int | None:
    """The step's highest memory beyond weights and optimiser state; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def run(
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    minutes: float | None = None,
    out: Path | None = None,
    show: Callable[[Any], None] = print,
) -> StepResult:
    """Run the benchmark, show what it finds, and return (and write) the result.

    Args:
        dtype: of the matrix products (autocast over float32 weights); float32 for none.
        minutes: compiled contestants are left out, and named, when more than half of it is gone before they start.
        show: takes each record as it is made: environment, ceilings, the result.

    Raises:
        ValueError: a setting is out of range.
        UserError: Transformers is not installed.
    """
    begin = time.monotonic()
    settings, drawn = _draw(settings)
    config = settings.config()
    where = environment(device)
    show(where)
    limits = measure_ceilings(device, dtype, quick=True)
    show(limits)
    flops = sum(batch_flops(config, batch) for batch in drawn) / BATCHES
    tokens = sum(batch.num_tokens for batch in drawn) / BATCHES
    batches = [batch.to(device) for batch in drawn]
    torch.manual_seed(0)
    hf = transformers_bert(config, device)
    few = {name: x[:CHECKED_SEQUENCES] for name, x in padded_examples(batches[0]).items()}
    check = _GradientCheck(hf, few, config.num_hidden_layers, dtype)

    verdicts: dict[str, tuple[str, Verdict]] = {}  # name → role, verdict
    prepared: dict[str, tuple[int, int | None]] = {}  # name → micro-batches, peak bytes
    steps: dict[str, Callable[[int], Any]] = {}
    left_out: list[str] = []
    for contestant in _contestants(settings, hf, batches, check, dtype):
        if minutes is not None and ", torch.compile" in contestant.name and time.monotonic() - begin > 30 * minutes:
            left_out.append(contestant.name)
            continue
        try:
            verdict = contestant.check()
            if verdict.may_be_timed:
                step, micro_batches = contestant.prepare()
                step(0)
                prepared[contestant.name] = micro_batches, _peak_bytes(step, device)
                steps[contestant.name] = step
        except Exception as error:  # one contestant less; the others go on
            verdict = Verdict(FAILED, detail=one_line(error))
        verdicts[contestant.name] = contestant.role, verdict
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    del check

    seconds = MOST_SECONDS if minutes is None else max(5.0, min(MOST_SECONDS, begin + 60 * minutes - time.monotonic()))
    works = {name: Work(step) for name, step in steps.items()}
    timings = {}
    if works:
        effort = {"seconds": 0.2, "max_rounds": 3, "min_rounds": 2} if quick else {"seconds": seconds, "min_rounds": 5}
        timings = interleave(works, device, calls=BATCHES, **effort)  # type: ignore[arg-type]
    # The form whose operators the dispatcher sees one by one.
    eager = steps.get("fusebert, no CUDA graph", steps.get("fusebert"))
    profiled = None if eager is None else profile_step(eager, device, limits, steps=BATCHES)
    ours = next((name for name, (role, _) in verdicts.items() if role == OURS and name in timings), None)
    rows = []
    for name, (role, verdict) in verdicts.items():
        timing, found = timings.get(name), None
        if timing is not None:
            per_second = 1e3 / timing.median_ms
            micro_batches, peak_bytes = prepared[name]
            found = StepTime(
                timing=timing,
                ratio_to_ours=ratio(timing.samples_ms, timings[ours].samples_ms) if ours else None,
                tokens_per_s=tokens * per_second,
                mfu=flops * per_second / limits.matmul_flops_per_s,
                micro_batches=micro_batches,
                peak_bytes=peak_bytes,
            )
        rows.append(StepContestant(name, role, verdict, found))
    result = StepResult(
        environment=where,
        settings=StepSettings(
            **dataclasses.asdict(settings)
            | {"data": None if settings.data is None else str(settings.data)}
            | {"compute_dtype": str(dtype).removeprefix("torch."), "quick": quick, "minutes": minutes}
        ),
        ceilings=limits,
        batch=StepBatch(
            tokens=tokens,
            sequences=sum(batch.num_pairs for batch in drawn) / BATCHES,
            masked=sum(batch.num_masked for batch in drawn) / BATCHES,
            padding_for_transformers=_padding(drawn),
            flops=flops,
        ),
        contestants=rows,
        profile=profiled,
        left_out=left_out,
        seconds=time.monotonic() - begin,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if out is not None:
        write_result(out, result)
    return result


def _draw(settings: Settings) -> tuple[Settings, list[PackedBatch]]:
    """The batches, and the settings as they turn out to be."""
    if settings.data is None:
        size, ragged = settings.vocab_size, settings.ragged
        return settings, random_batches(size, settings.tokens, settings.seqlen, BATCHES, ragged=ragged)
    corpus = Corpus.open(settings.data)
    shape = fit_shape(corpus.split("train"), settings.tokens, settings.seqlen)
    examples = PackedExamples(BatchMaker(corpus, "train", shape), seed=0)
    drawn = list(itertools.islice(corpus_batches(examples, num_workers=0), BATCHES))
    return dataclasses.replace(settings, vocab_size=corpus.vocab_size, ragged=True), drawn


def _padding(batches: list[PackedBatch]) -> float:
    """Share of [B, N] that is padding when these batches are padded to their longest."""
    slots = sum(int(batch.num_pairs * batch.cu_seqlens.diff()[: batch.num_pairs].max()) for batch in batches)
    return 1 - sum(batch.num_tokens for batch in batches) / slots


def ours_that_are_not_right(result: StepResult) -> list[str]:
    """Our own contestants that are wrong, coarse or failed, with what is wrong: this fails a run."""
    return [
        f"{row.name} is {row.verdict.status} ({row.verdict.detail})"
        for row in result.contestants
        if row.role == OURS and row.verdict.is_bad
    ]
