"""Each operator against its reference, its peers and the roofline: verify, then time, then say how sure that is."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import attention, layernorm, mlm_loss
from .cases import OURS, Case, Contestant, Cost, Run
from .ceilings import ceilings as measure_ceilings
from .environment import describe, environment, nvidia_smi
from .result_file import SCHEMA, write_json
from .tables import case_lines, ceiling_lines, missing_lines, summary_lines
from .timing import Ratio, Timing, Work, interleave, l2_bytes, ratio
from .verify import FAILED, RIGHT, Judge, Verdict, one_line, verify

OPERATORS = {"attention": attention.cases, "layernorm": layernorm.cases, "mlm_loss": mlm_loss.cases}
# Input sets a contestant walks through: enough that the L2 has forgotten the first when it comes round again.
L2_MULTIPLE, MOST_INPUT_SETS = 4, 8
BACKWARD_CALLS = 4  # graphs alive at once when a backward is timed alone


@dataclasses.dataclass(frozen=True)
class _Effort:
    """How long to measure one pass of one case, per contestant and at the least in all."""

    seconds_per_contestant: float
    max_rounds: int


FULL, QUICK = _Effort(0.35, 60), _Effort(0.02, 7)


def select_cases(op: str | None, device: torch.device, dtype: torch.dtype, *, quick: bool) -> list[Case]:
    """The cases of an operator, or of all, the most valuable first.

    Raises:
        ValueError: there is no such operator.
    """
    if op is not None and op not in OPERATORS:
        raise ValueError(f"there is no benchmark of {op!r}: choose one of {', '.join(OPERATORS)}")
    chosen = [make for name, make in OPERATORS.items() if op in (None, name)]
    return sorted((case for make in chosen for case in make(device, dtype, quick=quick)), key=lambda case: case.value)


def _input_sets(case: Case) -> int:
    size = sum(x.numel() * x.element_size() for x in case.inputs(0).values())
    if case.device.type != "cuda":
        return 2
    return max(2, min(MOST_INPUT_SETS, math.ceil(L2_MULTIPLE * l2_bytes(case.device) / size)))


def _work(name: str, contestant: Contestant, runs: list[Run]) -> Work:
    """The timed call of a pass, walking through ``runs``; a forward saves what its backward would need."""

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

    return Work(backward, graph, contestant.context, max_calls=BACKWARD_CALLS)


def _peak_bytes(work: Work, device: torch.device) -> int | None:
    """Memory beyond what is held before the call, at its highest; None on a CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    state = work.prepare(0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with work.context():
        work.run(state)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _contestant_json(
    contestant: Contestant,
    verdict: Verdict,
    timing: Timing | None,
    against: Ratio | None,
    peak_bytes: int | None,
    cost: Cost,
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": contestant.name, "role": contestant.role, "verdict": verdict.as_json()}
    if timing is not None:
        seconds = 1e-3 * timing.median
        found |= {
            "timing": timing.as_json(),
            "ratio_to_ours": None if against is None else dataclasses.asdict(against),
            "peak_bytes": peak_bytes,
            "flops_per_s": cost.flops / seconds,
            "bytes_per_s": cost.bytes / seconds,
            "roofline": cost.floor_ms(ceilings) / timing.median,
        }
    return found


def run_case(case: Case, ceilings: dict[str, Any], *, effort: _Effort = FULL) -> list[dict[str, Any]]:
    """Verify a case's contestants, time those that are right, pass by pass; a result for each pass."""
    torch.compiler.reset()  # compiled peers count their recompilations per function, over all cases
    inputs = case.inputs(12345)
    judges = {p: Judge(case, inputs, p) for p in sorted({0.0, case.dropout_p})}
    verdicts = {contestant.name: verify(case, contestant, judges) for contestant in case.contestants}
    del judges, inputs
    sets = [case.inputs(seed) for seed in range(_input_sets(case))]
    if case.device.type == "cpu":
        for drawn in sets:
            drawn.pop("seed", None)  # without it a CPU drops with torch's own generator, as in training; faster
    results = []
    for name, cost in case.passes.items():
        works: dict[str, Work] = {}
        peaks: dict[str, int | None] = {}
        for contestant in case.contestants:
            if not verdicts[contestant.name].may_be_timed:
                continue
            work = _work(name, contestant, [contestant.bind(inputs, case.dropout_p) for inputs in sets])
            try:
                with work.context():
                    work.run(work.prepare(0))  # compiles
                peaks[contestant.name] = _peak_bytes(work, case.device)
                works[contestant.name] = work
            except Exception as error:  # right, but does not fit, say
                verdicts[contestant.name] = Verdict(FAILED, detail=one_line(error))
        seconds = effort.seconds_per_contestant * len(works)
        timings = interleave(works, case.device, seconds=seconds, max_rounds=effort.max_rounds) if works else {}
        ours = next((c.name for c in case.contestants if c.role == OURS and c.name in timings), None)
        rows = []
        for contestant in case.contestants:
            timing = timings.get(contestant.name)
            against = ratio(timing.samples, timings[ours].samples) if timing and ours else None
            verdict, peak = verdicts[contestant.name], peaks.get(contestant.name)
            rows.append(_contestant_json(contestant, verdict, timing, against, peak, cost, ceilings))
        results.append(
            {
                "op": case.op,
                "case": case.name,
                "pass": name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape": dict(case.shape),
                "dropout": case.dropout_p,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "floor_ms": cost.floor_ms(ceilings),
                "limit": cost.limit(ceilings),
                "contestants": rows,
                "missing": [dataclasses.asdict(gap) for gap in case.missing],
            }
        )
    return results


def run(
    device: torch.device,
    dtype: torch.dtype,
    *,
    op: str | None = None,
    quick: bool = False,
    minutes: float | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the benchmark, print each case's table as it is measured, and return (and write) the result.

    Args:
        minutes: begin no case after so many; the most valuable cases come first, and what is left out is named.
        out: written after every case, so that a run cut short leaves what it had.
        say: takes each piece of output.

    Raises:
        ValueError: ``op`` is unknown.
    """
    begin = time.monotonic()
    selected = select_cases(op, device, dtype, quick=quick)
    where = environment(device)
    say(describe(where))
    limits = measure_ceilings(device, dtype, quick=quick)
    say("\n".join(ceiling_lines(limits)))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "kernels",
        "environment": where,
        "settings": {"op": op, "dtype": str(dtype).removeprefix("torch."), "quick": quick, "minutes": minutes},
        "ceilings": limits,
        "results": [],
        "left_out": [],
    }
    longest: dict[str, float] = {}  # seconds a case of an operator has taken at most
    for i, case in enumerate(selected):
        started = time.monotonic()
        expected = longest.get(case.op, 0.0)
        if i and minutes is not None and started + expected - begin > 60 * minutes:
            result["left_out"].append(f"{case.op} {case.name}")
            continue
        passes = run_case(case, limits, effort=QUICK if quick else FULL)
        result["results"] += passes
        for measured in passes:
            say("\n".join(case_lines(measured)))
        if case.missing:
            say("\n".join(missing_lines(case.missing)))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        longest[case.op] = max(expected, time.monotonic() - started)
        if out is not None:
            write_json(out, result)
    result["seconds"] = time.monotonic() - begin
    result["nvidia_smi_after"] = nvidia_smi() if device.type == "cuda" else None
    if out is not None:
        write_json(out, result)
    say("\n".join(summary_lines(result["results"])))
    if result["left_out"]:
        say(f"Left out for want of time ({minutes} minutes): {'; '.join(result['left_out'])}")
    return result


def ours_that_are_not_right(result: dict[str, Any]) -> list[str]:
    """Our own contestants that broke the rule, with what is wrong: this fails a run."""
    found = []
    for measured in result["results"]:
        for row in measured["contestants"]:
            if row["role"] == OURS and row["verdict"]["status"] != RIGHT:
                problem = f"{measured['op']} {measured['case']}: {row['name']} is {row['verdict']['status']}"
                found.append(f"{problem} ({row['verdict']['detail']})")
    return list(dict.fromkeys(found))


__all__ = ["OPERATORS", "ours_that_are_not_right", "run", "run_case", "select_cases"]
