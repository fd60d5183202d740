"""The suite's cases under pytest-benchmark, so that two commits can be compared by its ``--benchmark-compare``:

    PYTHONSAFEPATH=1 pytest bench --benchmark-only --benchmark-autosave              # at the old commit
    PYTHONSAFEPATH=1 pytest bench --benchmark-only --benchmark-compare               # at the new one
    PYTHONSAFEPATH=1 pytest bench --benchmark-only -k "attention and N512 and forward"

A benchmark is a pass of a case by one contestant, named op-case-pass-contestant (N512: -k takes no "="); on a CPU the
cases of ``fusebert bench kernels --quick``. It fails if ours is not right by the rule of `measure.correctness`, and is
skipped if a peer is not. A round is a burst of calls on inputs that together exceed the L2, with one synchronisation.
Times are the host's: to compare contestants with each other, use `fusebert bench kernels`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

# Absolute, because pytest imports this file as bench.operators.test_operators.
from fusebert.bench.measure.case import OURS, Case
from fusebert.bench.measure.correctness import RIGHT
from fusebert.bench.measure.serialise import to_json
from fusebert.bench.measure.verify import Judge, verify
from fusebert.bench.operators import run as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CALLS, ROUNDS, WARMUP_ROUNDS = (8, 30, 3) if DEVICE.type == "cuda" else (1, 7, 1)
CASES = {
    f"{case.op}-{case.name}": case for case in kernels.select_cases(None, DEVICE, DTYPE, quick=DEVICE.type == "cpu")
}
BENCHMARKS = [
    pytest.param(name, which, contestant.name, id=f"{name}-{which}-{contestant.name}".replace("=", ""))
    for name, case in CASES.items()
    for which in case.passes
    for contestant in case.contestants
]


@functools.lru_cache(maxsize=1)  # benchmarks of a case follow each other
def judges(name: str) -> dict[float, Judge]:
    torch.compiler.reset()  # compiled peers count their recompilations per function, over all cases
    case = CASES[name]
    inputs = case.inputs(12345)
    return {p: Judge(case, inputs, p) for p in {0.0, case.dropout_p}}


@functools.lru_cache(maxsize=1)
def input_sets(name: str) -> list[dict[str, torch.Tensor]]:
    return kernels.input_sets(CASES[name])


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(("name", "which", "contestant_name"), BENCHMARKS)
def test_operator(name: str, which: str, contestant_name: str, benchmark: Any) -> None:
    case: Case = CASES[name]
    contestant = next(c for c in case.contestants if c.name == contestant_name)
    verdict = verify(case, contestant, judges(name))
    if contestant.role == OURS:
        assert verdict.status == RIGHT, verdict.detail
    elif not verdict.may_be_timed:
        pytest.skip(f"{contestant_name} is {verdict.status}: {verdict.detail}")
    runs = [contestant.bind(inputs, case.dropout_p) for inputs in input_sets(name)]
    timed = kernels.work(which, contestant, runs)

    def prepare() -> tuple[tuple[list[Any]], dict[str, Any]]:
        states = [timed.prepare(i) for i in range(CALLS)]
        synchronize()
        return (states,), {}

    def burst(states: list[object]) -> None:
        for state in states:
            timed.run(state)
        synchronize()

    cost = case.passes[which]
    benchmark.group = f"{name} {which}"
    benchmark.extra_info.update(
        calls_per_round=CALLS, flops=cost.flops, bytes=cost.bytes, shape=dict(case.shape), verdict=to_json(verdict)
    )
    with timed.context():
        benchmark.pedantic(burst, setup=prepare, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
