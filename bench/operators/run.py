"""Each operator against its reference, its peers and the roofline: verify, time, and give each ratio its interval."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...train.errors import UserError
from ..measure.case import OURS, PEER, Case, Contestant, Run, Tensors, matches, with_peers
from ..measure.ceilings import Ceilings, measure_ceilings, measure_drift
from ..measure.correctness import FAILED, Verdict
from ..measure.machine import Clocks, environment, nvidia_smi
from ..measure.memory import PeakMemory, release_memory
from ..measure.result import KernelContestant, KernelsResult, KernelTime, PassResult, write_result
from ..measure.settings import KernelsOptions, KernelsSettings, settings_of
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave, l2_bytes
from ..measure.verify import Judge, one_line, verify
from . import attention, bias_gelu, embed_layernorm, gelu_epilogue, layernorm, mlm_loss
from .build import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        attention.OPERATOR,
        layernorm.OPERATOR,
        mlm_loss.OPERATOR,
        bias_gelu.OPERATOR,
        gelu_epilogue.LINEAR_GELU,
        gelu_epilogue.GELU_LINEAR,
        embed_layernorm.OPERATOR,
    )
}
# Calls rotate through so many input sets that the L2 has evicted the first before its next use.
L2_MULTIPLE, MOST_INPUT_SETS = 4, 64
# Graphs alive at once when a backward is timed alone: each is taken to hold three times its inputs.
GRAPHS_BYTES, MOST_GRAPHS = 12 << 30, 24


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure one pass of a case."""

    seconds_per_contestant: float
    max_rounds: int


FULL, QUICK = Effort(0.35, 60), Effort(0.02, 7)


def select_cases(
    op: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    shapes: str | None = None,
    peers: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of an operator, or of all, the most valuable first.

    Args:
        shapes: these (see `shapes`), of one operator, in place of the built-in ones.
        peers: only these peers (see `with_peers`).

    Raises:
        UserError: there is no such operator or peer, or a shape is not allowed.
    """
    if op is not None and op not in OPERATORS:
        raise UserError(f"--op {op}: choose one of {', '.join(OPERATORS)}")
    if shapes is not None and op is None:
        raise UserError(f"--shapes belongs to one operator: give --op with it, one of {', '.join(OPERATORS)}")
    chosen = [operator for name, operator in OPERATORS.items() if op in (None, name)]
    try:
        cases = [case for operator in chosen for case in operator.cases(device, dtype, quick=quick, shapes=shapes)]
    except ValueError as error:
        raise UserError(f"--shapes: {error}") from error
    if peers is not None:
        existing = list(dict.fromkeys(name for case in cases for name in _peer_names(case)))
        for given in peers:
            if not any(matches(name, given) for name in existing):
                raise UserError(f"--peers: there is no peer {given!r} here: choose among {'; '.join(existing)}")
        cases = [with_peers(case, peers) for case in cases]
    return sorted(cases, key=lambda case: case.value)


def _peer_names(case: Case) -> list[str]:
    return [c.name for c in case.contestants if c.role == PEER] + [gap.name for gap in case.missing]


def _input_bytes(case: Case) -> int:
    return sum(x.numel() * x.element_size() for x in case.inputs(0).values())


def input_sets(case: Case) -> list[Tensors]:
    """The inputs that timed calls rotate through: together they exceed the L2 several times."""
    if case.device.type == "cuda":
        count = math.ceil(L2_MULTIPLE * l2_bytes(case.device) / _input_bytes(case))
        return [case.inputs(seed) for seed in range(max(2, min(MOST_INPUT_SETS, count)))]
    sets = [case.inputs(seed) for seed in range(2)]
    for drawn in sets:
        drawn.pop("seed", None)  # on a CPU dropout then draws from torch's generator, as in training, which is faster
    return sets


def work(name: str, contestant: Contestant, runs: list[Run], *, max_graphs: int = 1) -> Work:
    """The timed call of the pass ``name``, rotating through ``runs``; a forward saves what its backward would need.

    Gradients are new tensors (see `Run`), so nothing is accumulated and no accumulation is timed.

    Args:
        max_graphs: calls of a backward alone in a burst, each of which holds what its forward saved.
    """

    def pick(index: int) -> Run:
        return runs[index % len(runs)]

    if name == "inference":

        def inference(run: Run) -> None:
            with torch.no_grad():
                run.forward()

        return Work(inference, pick, contestant.context)
    if name == "forward":
        return Work(lambda run: run.forward(), pick, contestant.context)
    if name == "forward+backward":
        return Work(Run.forward_backward, pick, contestant.context)

    def graph(index: int) -> tuple[Run, torch.Tensor]:
        return pick(index), pick(index).forward()

    def backward(state: tuple[Run, torch.Tensor]) -> None:
        state[0].backward(state[1])

    return Work(backward, graph, contestant.context, max_calls=max_graphs)


def _peak_bytes(timed: Work, device: torch.device) -> int | None:
    state = timed.prepare(0)
    with PeakMemory(device) as memory, timed.context():
        timed.run(state)
    return memory.bytes


def run_case(case: Case, ceilings: Ceilings, *, effort: Effort = FULL) -> list[PassResult]:
    """Verify a case's contestants and time those that are right, pass by pass; a result for each pass."""
    torch.compiler.reset()  # compiled peers count their recompilations per function, over all cases
    inputs = case.inputs(12345)
    judges = {p: Judge(case, inputs, p) for p in sorted({0.0, case.dropout_p})}
    verdicts = {contestant.name: verify(case, contestant, judges) for contestant in case.contestants}
    del judges, inputs
    sets = input_sets(case)
    return [_run_pass(case, which, sets, verdicts, ceilings, effort) for which in case.passes]


def _run_pass(
    case: Case, which: str, sets: list[Tensors], verdicts: dict[str, Verdict], ceilings: Ceilings, effort: Effort
) -> PassResult:
    """Time one pass. A contestant that raises gets another verdict, in ``verdicts``."""
    max_graphs = max(1, min(MOST_GRAPHS, GRAPHS_BYTES // (3 * _input_bytes(case))))
    works: dict[str, Work] = {}
    peaks: dict[str, int | None] = {}
    for contestant in case.contestants:
        name = contestant.name
        if not verdicts[name].may_be_timed:
            continue
        try:
            runs = [contestant.bind(inputs, case.dropout_p) for inputs in sets]
            timed = work(which, contestant, runs, max_graphs=max_graphs)
            with timed.context():
                timed.run(timed.prepare(0))  # compiles
            peaks[name] = _peak_bytes(timed, case.device)
            works[name] = timed
        except Exception as error:  # for example: out of memory
            verdicts[name] = Verdict(FAILED, detail=one_line(error))
    timings = {}
    if works:
        seconds = effort.seconds_per_contestant * len(works)
        timings = interleave(works, case.device, seconds=seconds, max_rounds=effort.max_rounds, device_time=True)
    ours = next((c.name for c in case.contestants if c.role == OURS and c.name in timings), None)
    floor = case.passes[which].floor(ceilings)
    rows = []
    for contestant in case.contestants:
        timing, found = timings.get(contestant.name), None
        if timing is not None:
            found = KernelTime(
                timing=timing,
                ratio_to_ours=ratio(timing.samples_ms, timings[ours].samples_ms) if ours else None,
                peak_bytes=peaks[contestant.name],
                flops_per_s=floor.flops / (1e-3 * timing.median_ms),
                bytes_per_s=floor.bytes / (1e-3 * timing.median_ms),
                roofline=floor.floor_ms / timing.median_ms,
            )
        rows.append(KernelContestant(contestant.name, contestant.role, verdicts[contestant.name], found))
    return PassResult(
        op=case.op,
        case=case.name,
        pass_name=which,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=dict(case.shape),
        dropout=case.dropout_p,
        floor=floor,
        contestants=tuple(rows),
        missing=case.missing,
    )


def run(options: KernelsOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> KernelsResult:
    """Run the benchmark, show each pass as it is measured, and return (and write) the result.

    Args:
        options: resolved for the device. ``minutes``: no case begins that would end later; the most valuable come
            first, and those left out are named. ``out``: written after every case, so that a run that is cut short
            leaves what it had.
        show: takes each record as it is made: environment, ceilings, passes, the result; and remarks, as text.

    Raises:
        UserError: as `select_cases`.
    """
    begin = time.monotonic()
    dtype, quick, minutes, out = getattr(torch, options.dtype), options.quick, options.minutes, options.out
    selected = select_cases(options.op, device, dtype, quick=quick, shapes=options.shapes, peers=options.peers)
    where = environment(device)
    show(where)
    limits = measure_ceilings(device, dtype, quick=quick)
    show(limits)
    result = KernelsResult(where, settings_of(KernelsSettings, options), limits)
    longest: dict[str, float] = {}  # seconds a case of an operator has taken at most
    with Clocks(device) as clocks:
        for i, case in enumerate(selected):
            started = time.monotonic()
            expected = longest.get(case.op, 0.0)
            if i and minutes is not None and started + expected - begin > 60 * minutes:
                result.left_out.append(f"{case.op} {case.name}")
                continue
            try:
                passes = run_case(case, limits, effort=QUICK if quick else FULL)
            except torch.OutOfMemoryError as error:  # of the oracle, in float64; the other cases go on
                show(f"\n{case.op} {case.name}: not measured: {one_line(error)}")
                result.did_not_fit.append(f"{case.op} {case.name}")
                passes = []
            result.results += passes
            for measured in passes:
                show(measured)
            for gap in case.missing:
                show(gap)
            release_memory(device)
            longest[case.op] = max(expected, time.monotonic() - started)
            if out is not None:
                write_result(out, result)
    result.clocks = clocks.found
    result.ceilings_drift = measure_drift(limits, device, dtype)
    result.seconds = time.monotonic() - begin
    result.nvidia_smi_after = nvidia_smi(device)
    if out is not None:
        write_result(out, result)
    show(result)
    return result
