"""One whole training step, ours against Transformers', on the same examples: forward, backward, clip, AdamW.

All contestants start from the same weights, and only those with a right gradient (`gradients`) are timed. Then steps
alternate between the contestants (see `timing`); on a CPU each has the number of threads that suits it best. Tokens a
second counts real tokens only, for every contestant; so does MFU, over the matrix-product rate measured in the same
run. At the end our step is profiled operator by operator.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...model import BertForPreTraining, PackedBatch
from ...model.fp8 import fp8_obstacle, use_fp8
from ...train.batches.batch_maker import BatchMaker, fit_shape
from ...train.batches.dataset import PackedExamples
from ...train.batches.loader import batches as corpus_batches
from ...train.corpus.reader import Corpus
from ...train.step.flops import batch_flops
from ...train.step.graphs import WARMUP_STEPS
from ..measure.case import OURS, PEER
from ..measure.ceilings import measure_ceilings
from ..measure.correctness import FAILED, UNCHECKED, Verdict
from ..measure.machine import environment, nvidia_smi
from ..measure.memory import PeakMemory, release_memory
from ..measure.result import StepBatch, StepContestant, StepResult, StepTime, write_result
from ..measure.settings import StepOptions, StepSettings, settings_of
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave
from ..measure.verify import one_line
from .batches import random_batches
from .contestants import LR, our_model, our_step, preset, their_step
from .gradients import GradientCheck
from .profile import profile_step
from .transformers_step import padded_examples, transformers_bert

BATCHES = 2  # each burst runs through all of them, so that every burst has the same tokens
CHECKED_SEQUENCES = 8
THREAD_TRIALS = 3  # steps with each number of threads
MOST_SECONDS = 40.0  # of measuring, however much time there is

Step = Callable[[int], Any]  # takes the number of the batch


@dataclasses.dataclass(frozen=True)
class _Contestant:
    """``check`` judges its gradient; ``prepare`` builds its step, untimed: (step, micro-batches)."""

    name: str
    role: str
    check: Callable[[], Verdict]
    prepare: Callable[[], tuple[Step, int]]


def _prepare_ours(
    model: BertForPreTraining, batches: list[PackedBatch], dtype: torch.dtype, compiled: bool, graph: bool
) -> tuple[Step, int]:
    step = our_step(model, dtype, graph=graph, compiled=compiled)
    for i in range(WARMUP_STEPS + 1 if graph else 0):
        step([batches[i % BATCHES]], LR)
    return lambda i: step([batches[i % BATCHES]], LR), 1


def _prepare_theirs(
    model: nn.Module, batches: list[PackedBatch], dtype: torch.dtype, compiled: bool, gather: bool
) -> tuple[Step, int]:
    step = their_step(model, dtype, compiled=compiled, gather=gather)
    examples = [padded_examples(batch) for batch in batches]
    step.train(examples[0])
    micros = [step.split(each) for each in examples]
    return lambda i: step(micros[i % BATCHES]), step.parts


def _contestants(
    hf: nn.Module, batches: list[PackedBatch], check: GradientCheck, dtype: torch.dtype, *, compile_too: bool
) -> Iterator[_Contestant]:
    """Ours first, then Transformers with and without the masked rows only; then all compiled, the slowest to build."""
    device = batches[0].input_ids.device
    on_gpu = device.type == "cuda"
    of_checked = functools.partial(Verdict, UNCHECKED, detail="the compiled form of a checked model")
    bind = functools.partial
    for compiled in (False, True) if compile_too else (False,):
        suffix = ", torch.compile" if compiled else ""
        for graph in (True, False) if on_gpu else (False,):  # the first is what training does by default
            ours = our_model(hf, device)
            yield _Contestant(
                f"fusebert{suffix}{', no CUDA graph' if on_gpu and not graph else ''}",
                OURS,
                of_checked if compiled else bind(check.ours, ours),
                bind(_prepare_ours, ours, batches, dtype, compiled, graph),
            )
        if not compiled and dtype == torch.bfloat16 and fp8_obstacle(device) is None:
            use_fp8(ours := our_model(hf, device))
            detail = "fp8 rounds more coarsely than bf16: compare loss curves"
            verdict = bind(Verdict, UNCHECKED, detail=detail)
            yield _Contestant("fusebert, fp8", OURS, verdict, bind(_prepare_ours, ours, batches, dtype, False, on_gpu))
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
                of_checked if compiled else bind(check.theirs, theirs, compute, gather=gather),
                bind(_prepare_theirs, theirs, batches, compute, compiled, gather),
            )


@dataclasses.dataclass
class _Entry:
    """A contestant on its way to a row of the result. ``step`` is None if it is not timed."""

    name: str
    role: str
    verdict: Verdict
    step: Step | None = None
    micro_batches: int = 1
    peak_bytes: int | None = None
    threads: int | None = None


def _enter(contestant: _Contestant, device: torch.device) -> _Entry:
    """Check and prepare a contestant. One that raises is out; the others go on."""
    entry = _Entry(contestant.name, contestant.role, Verdict(UNCHECKED))
    try:
        entry.verdict = contestant.check()
        if entry.verdict.may_be_timed:
            step, entry.micro_batches = contestant.prepare()
            step(0)
            if device.type == "cpu":
                entry.threads = best_threads(step)
                step = functools.partial(_with_threads, entry.threads, step)
            with PeakMemory(device) as memory:
                step(0)
            entry.step, entry.peak_bytes = step, memory.bytes
    except Exception as error:
        entry.verdict = Verdict(FAILED, detail=one_line(error))
    release_memory(device)
    return entry


def _with_threads(threads: int, step: Step, i: int) -> Any:
    torch.set_num_threads(threads)
    return step(i)


def best_threads(step: Step) -> int:
    """The number of PyTorch's threads with the quickest of a few steps: 1, 2, 4, …, at most as many as it has now."""
    most, seconds = torch.get_num_threads(), dict[int, float]()
    for threads in sorted({*(1 << n for n in range(most.bit_length())), most}):
        torch.set_num_threads(threads)
        step(0)
        times = []
        for _ in range(THREAD_TRIALS):
            begin = time.perf_counter()
            step(0)
            times.append(time.perf_counter() - begin)
        seconds[threads] = min(times)
    torch.set_num_threads(most)
    return min(seconds, key=lambda threads: seconds[threads])


def run(options: StepOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> StepResult:
    """Run the benchmark, show what it finds, and return (and write) the result.

    Args:
        options: resolved for the device. ``minutes``: compiled contestants are left out, and named, if more than half
            of it is over before they start.
        show: takes each record as it is made: environment, ceilings, the result.

    Raises:
        ValueError: a setting is out of range.
        UserError: Transformers is not installed.
    """
    begin, threads = time.monotonic(), torch.get_num_threads()
    dtype, minutes = getattr(torch, options.compute_dtype), options.minutes
    options, drawn = _draw(options)
    config = preset(options.model, options.vocab_size, seqlen=options.seqlen, dropout=options.dropout)
    where = environment(device)
    show(where)
    limits = measure_ceilings(device, dtype, quick=True)
    show(limits)
    tokens = sum(batch.num_tokens for batch in drawn) / BATCHES
    flops = sum(batch_flops(config, batch) for batch in drawn) / BATCHES
    batches = [batch.to(device) for batch in drawn]
    torch.manual_seed(0)
    hf = transformers_bert(config, device)
    few = {name: x[:CHECKED_SEQUENCES] for name, x in padded_examples(batches[0]).items()}
    check = GradientCheck(hf, few, config.num_hidden_layers, dtype)

    entries: list[_Entry] = []
    left_out: list[str] = []
    for contestant in _contestants(hf, batches, check, dtype, compile_too=options.compiled):
        if minutes is not None and ", torch.compile" in contestant.name and time.monotonic() - begin > 30 * minutes:
            left_out.append(contestant.name)
        else:
            entries.append(_enter(contestant, device))
    del check

    works = {entry.name: Work(entry.step) for entry in entries if entry.step}
    timings = {}
    if works and options.quick:
        timings = interleave(works, device, calls=BATCHES, seconds=0.2, max_rounds=3, min_rounds=2)
    elif works:
        left = MOST_SECONDS if minutes is None else begin + 60 * minutes - time.monotonic()
        timings = interleave(works, device, calls=BATCHES, seconds=max(5.0, min(MOST_SECONDS, left)), min_rounds=5)
    # The profiler sees single operators only outside a CUDA graph.
    steps = {entry.name: entry.step for entry in entries}
    eager = steps.get("fusebert, no CUDA graph", steps.get("fusebert"))
    profiled = None if eager is None else profile_step(eager, device, limits, steps=BATCHES)
    torch.set_num_threads(threads)

    ours = next((entry.name for entry in entries if entry.role == OURS and entry.name in timings), None)
    rows = []
    for entry in entries:
        timing, found = timings.get(entry.name), None
        if timing is not None:
            per_second = 1e3 / timing.median_ms
            found = StepTime(
                timing=timing,
                ratio_to_ours=ratio(timing.samples_ms, timings[ours].samples_ms) if ours else None,
                tokens_per_s=tokens * per_second,
                mfu=flops * per_second / limits.matmul_flops_per_s,
                micro_batches=entry.micro_batches,
                peak_bytes=entry.peak_bytes,
                threads=entry.threads,
            )
        rows.append(StepContestant(entry.name, entry.role, entry.verdict, found))
    result = StepResult(
        environment=where,
        settings=settings_of(StepSettings, options),
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
    if options.out is not None:
        write_result(options.out, result)
    return result


def _draw(options: StepOptions) -> tuple[StepOptions, list[PackedBatch]]:
    """The batches; of a corpus, the options have its vocabulary and ragged lengths."""
    if options.data is None:
        size, ragged = options.vocab_size, options.ragged
        return options, random_batches(size, options.tokens, options.seqlen, BATCHES, ragged=ragged)
    corpus = Corpus.open(Path(options.data))
    shape = fit_shape(corpus.split("train"), options.tokens, options.seqlen)
    examples = PackedExamples(BatchMaker(corpus, "train", shape), seed=0)
    drawn = list(itertools.islice(corpus_batches(examples, num_workers=0), BATCHES))
    return dataclasses.replace(options, vocab_size=corpus.vocab_size, ragged=True), drawn


def _padding(batches: list[PackedBatch]) -> float:
    """Share of [B, N] that is padding when these batches are padded to their longest."""
    slots = sum(int(batch.num_pairs * batch.cu_seqlens.diff()[: batch.num_pairs].max()) for batch in batches)
    return 1 - sum(batch.num_tokens for batch in batches) / slots
