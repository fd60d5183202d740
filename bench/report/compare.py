"""``fusebert bench compare``: whether anything of ours is slower than it was, beyond noise.

For each pass of each case, and each contestant of ours in it, over the rounds i of a run:

    t_i       milliseconds a call of ours
    m_i       machine: median over the others of (theirs in round i) / (their median in the old file)
    ratio     median over the new rounds of t_i / m_i, over the same of the old rounds

The others (peers and bounds) run code that did not change, so their slowdown is the machine's, within a run and between
the runs, and is divided out. The median tolerates one other that misbehaves. This holds while their versions are the
same. Where a package's version differs between the files, or no other was timed in both, m is 1 and a remark says so.

The interval is a bootstrap of both files' rounds, drawn independently. Its level is 1 − 0.05 / rows (Bonferroni), so
that all rows of the table together hold with 95 %. A case is "slower" when the whole interval lies above 1 + threshold;
the threshold covers differences between two runs that their rounds do not show (memory layout, other processes). Where
the interval only reaches above it, the case is "unclear", which passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...train.errors import UserError
from ..measure.correctness import COARSE
from ..measure.machine import Environment
from ..measure.result import KernelsResult, OperatorPredictResult, PredictResult, StepResult, TrainResult, read_result
from ..measure.statistics import Ratio, ratio_of_runs
from .columns import AnyContestant, Column, interval, milliseconds, table
from .compare_predictions import CHANGES, Prediction, compare_predictions
from .render import terminal

FAILURES = ("slower", "WRONG")
CONFIDENCE = 0.95  # in all rows of a table together
TRAIN_SETTINGS = ("data", "model", "tokens", "seqlen", "dropout", "workers", "vocab_size", "compute_dtype")
STEP_SETTINGS = ("model", "tokens", "seqlen", "ragged", "dropout", "vocab_size", "compute_dtype")
Comparable = KernelsResult | StepResult | TrainResult


class _Pass(NamedTuple):
    """What is compared: its name, what must be equal for that, and the contestants."""

    name: str
    shape: Mapping[str, Any]
    contestants: Sequence[AnyContestant]


def _passes(result: Comparable) -> dict[str, _Pass]:
    if isinstance(result, StepResult):
        settings = {name: getattr(result.settings, name) for name in STEP_SETTINGS}
        lengths = "ragged" if result.settings.ragged else "equal"
        name = f"step {settings['model']} {settings['compute_dtype']} {lengths} {settings['seqlen']}"
        return {name: _Pass(name, {**settings, **dataclasses.asdict(result.batch)}, result.contestants)}
    if isinstance(result, TrainResult):
        settings = {name: getattr(result.settings, name) for name in TRAIN_SETTINGS}
        name = f"train {settings['model']} {settings['compute_dtype']}, 1,000 tokens"
        return {name: _Pass(name, settings, result.contestants)}
    found = {}
    for each in result.results:
        name = f"{each.op} {each.case} {each.dtype} {each.pass_name}"
        shape = {**each.shape, "flops": each.floor.flops, "bytes": each.floor.bytes, "dropout": each.dropout}
        found[name] = _Pass(name, shape, each.contestants)
    return found


def _machine(where: Environment) -> dict[str, Any]:
    """What must be the same for times to be comparable."""
    if where.gpu:
        return {"device": "cuda", "GPU": where.gpu.name}
    return {
        "device": where.device,
        "processor": where.processor,
        "cores": where.cores,
        "PyTorch threads": where.torch_threads,
    }


def _samples(contestant: AnyContestant) -> np.ndarray | None:
    return np.asarray(contestant.time.timing.samples_ms, dtype=np.float64) if contestant.time else None


def _others(old: _Pass, new: _Pass) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples, old and new, of the peers and bounds that were timed in both."""
    found = []
    after = {x.name: _samples(x) for x in new.contestants}
    for contestant in old.contestants:
        pair = _samples(contestant), after.get(contestant.name)
        if not contestant.is_ours and pair[0] is not None and pair[1] is not None:
            found.append((pair[0], pair[1]))
    return found


def machine_factors(others: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """m of each old and of each new round.

    Args:
        others: at least one; samples of the same rounds, old and new.
    """
    medians = [np.median(old) for old, _ in others]
    old, new = (
        np.median([samples[which] / median for samples, median in zip(others, medians, strict=True)], axis=0)
        for which in (0, 1)
    )
    return old, new


@dataclasses.dataclass(frozen=True)
class Finding:
    """One contestant of ours in one pass.

    Attributes:
        old_ms, new_ms: medians as measured; None where it was not timed.
        machine: new / old time of the others; None where that is not known.
        ratio: new / old with the machine divided out; None where either was not timed.
        verdict: "same", "slower", "faster", "unclear", "WRONG" (worse than before) or "not compared".
        detail: the reason, where the numbers do not give it.
    """

    name: str
    old_ms: float | None
    new_ms: float | None
    machine: float | None
    ratio: Ratio | None
    verdict: str
    detail: str = ""


def judge(found: Ratio, threshold: float) -> str:
    """The verdict of an interval."""
    if found.low > 1 + threshold:
        return "slower"
    if found.high < 1 / (1 + threshold):
        return "faster"
    return "same" if found.high <= 1 + threshold else "unclear"


def _wrongness(contestant: AnyContestant) -> int:
    verdict = contestant.verdict
    return 0 if not verdict.is_bad else 1 if verdict.status == COARSE else 2


def _compare_pass(old: _Pass, new: _Pass, normalise: bool, threshold: float, confidence: float) -> Iterator[Finding]:
    others = _others(old, new) if normalise else []
    machine = machine_factors(others) if others else None
    drift = None if machine is None else float(np.median(machine[1]) / np.median(machine[0]))
    for before in old.contestants:
        if not before.is_ours:
            continue
        name = f"{old.name}: {before.name}"
        after = next((x for x in new.contestants if x.name == before.name), None)
        old_ms = before.time.timing.median_ms if before.time else None
        if after is None:
            yield Finding(name, old_ms, None, drift, None, "not compared", "the new file has no such contestant")
            continue
        new_ms = after.time.timing.median_ms if after.time else None
        samples = _samples(before), _samples(after)
        if _wrongness(after) > _wrongness(before):
            detail = f"was {before.verdict.status}, is {after.verdict.status}: {after.verdict.detail}"
            yield Finding(name, old_ms, new_ms, drift, None, "WRONG", detail)
        elif samples[0] is None or samples[1] is None:
            which = "either" if old_ms is new_ms else "the old" if old_ms is None else "the new"
            yield Finding(name, old_ms, new_ms, drift, None, "not compared", f"not timed in {which} file")
        else:
            factors = machine or (np.ones(1), np.ones(1))
            found = ratio_of_runs(samples[0] / factors[0], samples[1] / factors[1], confidence)
            yield Finding(name, old_ms, new_ms, drift, found, judge(found, threshold))


def _refuse_if_incomparable(old: Comparable, new: Comparable) -> None:
    if old.kind != new.kind:
        raise UserError(f"not comparable: the old file holds {old.kind}, the new one {new.kind}")
    before, after = _machine(old.environment), _machine(new.environment)
    for name, was, is_now in _differences(before, after):
        raise UserError(f"not comparable: {name} was {was} and is {is_now}; measure both on one machine")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where the two differ."""
    keys = dict.fromkeys([*old, *new])
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _arrows(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {was} → {is_now}" for key, was, is_now in _differences(old, new))


def compare(old: Comparable, new: Comparable, *, threshold: float = 0.03) -> tuple[list[Finding], list[str]]:
    """Compare two results of kernels, of step, or of train.

    Returns:
        A finding for each of our contestants in each pass that both have, and remarks: what limits the comparison.

    Raises:
        UserError: they were measured on different machines, are of different kinds, or have no pass in common.
    """
    _refuse_if_incomparable(old, new)
    remarks = []
    changed = _arrows(old.environment.versions, new.environment.versions)
    if changed:
        remarks.append(f"peers may have changed ({changed}): the machine's share cannot be divided out")
    before, after = _passes(old), _passes(new)
    pairs: list[tuple[_Pass, _Pass]] = []
    for name, old_pass in before.items():
        new_pass = after.get(name)
        if new_pass is None:
            remarks.append(f"not compared: {name}: the new file lacks it")
        elif old_pass.shape != new_pass.shape:
            remarks.append(f"not compared: {name}: another shape ({_arrows(old_pass.shape, new_pass.shape)})")
        else:
            pairs.append((old_pass, new_pass))
    remarks += [f"not compared: {name}: the old file lacks it" for name in after if name not in before]
    rows = sum(each.is_ours for old_pass, _ in pairs for each in old_pass.contestants)
    confidence = 1 - (1 - CONFIDENCE) / max(1, rows)
    findings = [x for pair in pairs for x in _compare_pass(*pair, not changed, threshold, confidence)]
    if not findings:
        reasons = "; ".join(line for line in remarks if line.startswith("not compared")) or "they are empty"
        raise UserError(f"not comparable: no pass in common ({reasons})")
    if any(finding.machine is None and finding.ratio for finding in findings) and not changed:
        remarks.append("where machine is -, no peer was timed in both files: times are compared as they are")
    return findings, remarks


COLUMNS: tuple[Column[Finding], ...] = (
    Column("", lambda x: x.name, words=True),
    Column("old", lambda x: x.old_ms or "-", milliseconds),
    Column("new", lambda x: x.new_ms or "-", milliseconds),
    Column("machine", lambda x: x.machine or "-", "{:.3f}"),
    Column("new / old [95 % in all]", lambda x: x.ratio or "-", interval),
    Column("verdict", lambda x: x.verdict, words=True),
)


def _predictions(old: Prediction, new: Prediction, threshold: float, say: Callable[[str], None]) -> bool:
    """`run` for two predictions; prints what changed."""
    changes, remarks = compare_predictions(old, new, threshold)
    changed = [change for change in changes if change.verdict != "same"]
    if changed:
        terminal([table(CHANGES, changed, bad=lambda change: change.verdict in ("slower", "refused"))])
    for remark in remarks:
        say(remark)
    bad = sum(change.verdict in ("slower", "refused") for change in changed)
    say(f"{'FAILED' if bad else 'passed'}: {len(changes)} predicted quantities compared, {bad} worse")
    return not bad


def run(old: Path, new: Path, *, threshold: float, say: Callable[[str], None] = print) -> bool:
    """Compare two files and print what was found.

    Returns:
        Whether nothing of ours became wrong, or slower beyond noise.

    Raises:
        UserError: a file is not a result of kernels, step, train or predict, or the two cannot be compared.
    """
    kinds = (KernelsResult, OperatorPredictResult, PredictResult, StepResult, TrainResult)
    before, after = (read_result(path, *kinds) for path in (old, new))
    if isinstance(before, Prediction) and isinstance(after, Prediction):
        return _predictions(before, after, threshold, say)
    findings, remarks = compare(before, after, threshold=threshold)  # type: ignore[arg-type]
    terminal([table(COLUMNS, findings, bad=lambda found: found.verdict in FAILURES)])
    for found in findings:
        if found.detail:
            say(f"{found.name}: {found.detail}")
    for remark in remarks:
        say(remark)
    verdicts = [found.verdict for found in findings]
    count = {name: verdicts.count(name) for name in ("slower", "WRONG", "faster", "unclear", "not compared")}
    failed = sum(count[verdict] for verdict in FAILURES)
    summary = ", ".join(f"{n} {name}" for name, n in count.items() if n)
    say(f"{'FAILED' if failed else 'passed'}: {len(findings)} compared" + (f": {summary}" if summary else ""))
    if count["unclear"]:
        say(f"unclear: noise hides whether it is more than {100 * threshold:g} % slower; measure longer, undisturbed")
    return not failed
