"""``fusebert bench compare``: is anything of ours slower than it was, beyond noise?

For each pass of each case, and each contestant of ours in it, over the rounds i of a run:

    t_i       milliseconds a call of ours
    m_i       what the machine did: median over the others of (theirs in round i) / (their median in the old file)
    ratio     median over the new rounds of t_i / m_i, over the same of the old rounds

The others (peers, and bounds) run code that did not change, so what they suffer is the machine's doing, round by round
and between the runs, and is divided out; the median lets one of them misbehave. That holds while they are the same
versions: where a package's version differs between the files, or no other was timed in both, m is 1 and it is said.

The interval is a bootstrap (Efron 1979): rounds of both files drawn with replacement, independently. Its level is such
that it holds for all rows together with 95 %: 1 − 0.05 / rows each (Bonferroni), or a long table would cry wolf. A case
is "slower" when the whole interval lies above 1 + threshold, which is there for what two runs differ by and their
rounds do not know (memory layout, neighbours). Where the interval only reaches beyond it, noise hides the answer:
"unclear", which passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...train.errors import UserError
from ..measure.case import OURS
from ..measure.correctness import COARSE, RIGHT, UNCHECKED
from ..measure.result import KernelsResult, Result, StepResult, TrainResult, read_result, result_json
from ..measure.statistics import Ratio, ratio_of_runs
from ..measure.units import interval, milliseconds
from .tables import columns

CONFIDENCE = 0.95  # in all rows of a table together
KINDS: tuple[type[Result], ...] = (KernelsResult, StepResult, TrainResult)
TRAIN_SETTINGS = ("data", "model", "tokens", "seqlen", "dropout", "workers", "vocab_size", "compute_dtype")
STEP_SETTINGS = ("model", "tokens", "seqlen", "ragged", "dropout", "vocab_size", "compute_dtype")


class _Pass(NamedTuple):
    """What is compared: its name, what must be equal for that, and who ran."""

    name: str
    shape: Mapping[str, Any]
    contestants: Sequence[Mapping[str, Any]]


def _passes(result: Mapping[str, Any]) -> dict[str, _Pass]:
    if result["kind"] == "step":
        settings = {name: result["settings"][name] for name in STEP_SETTINGS}
        lengths = "ragged" if settings["ragged"] else "equal"
        name = f"step {settings['model']} {settings['compute_dtype']} {lengths} {settings['seqlen']}"
        return {name: _Pass(name, {**settings, **result["batch"]}, result["contestants"])}
    if result["kind"] == "train":
        settings = {name: result["settings"][name] for name in TRAIN_SETTINGS}
        name = f"train {settings['model']} {settings['compute_dtype']}, 1,000 tokens"
        return {name: _Pass(name, settings, [_by_turns(each) for each in result["contestants"]])}
    found = {}
    for each in result["results"]:
        name = f"{each['op']} {each['case']} {each['dtype']} {each['pass']}"
        shape = {**each["shape"], "flops": each["flops"], "bytes": each["bytes"], "dropout": each["dropout"]}
        found[name] = _Pass(name, shape, each["contestants"])
    return found


def _by_turns(contestant: Mapping[str, Any]) -> dict[str, Any]:
    """A contestant of a training run, its turns as rounds: µs a token are ms for a thousand."""
    turns = contestant.get("us_per_token")
    if not turns:
        return dict(contestant)
    return {**contestant, "timing": {"samples_ms": turns, "median_ms": float(np.median(turns))}}


def _machine(result: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for times to be comparable."""
    where = result["environment"]
    if where["device"] == "cuda":
        return {"device": "cuda", "GPU": where["gpu"]["name"]}
    return {
        "device": where["device"],
        "processor": where["processor"],
        "cores": where["cores"],
        "PyTorch threads": where["torch_threads"],
    }


def _samples(contestant: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(contestant["timing"]["samples_ms"], dtype=np.float64)


def _others(old: _Pass, new: _Pass) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples, old and new, of everybody but us who was timed in both."""
    found = []
    for before in old.contestants:
        after = next((x for x in new.contestants if x["name"] == before["name"]), {})
        if before["role"] != OURS and "timing" in before and "timing" in after:
            found.append((_samples(before), _samples(after)))
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
        old_ms, new_ms: medians as they were measured; None where it was not timed.
        machine: by how much the others got slower; None where that can not be said.
        ratio: new / old with the machine divided out; None where one of them was not timed.
        verdict: "same", "slower", "faster", "unclear", "WRONG" (it was less so before) or "not compared".
        detail: why, where that is not in the figures.
    """

    name: str
    old_ms: float | None
    new_ms: float | None
    machine: float | None
    ratio: Ratio | None
    verdict: str
    detail: str = ""


def judge(found: Ratio, threshold: float) -> str:
    """What an interval says."""
    if found.low > 1 + threshold:
        return "slower"
    if found.high < 1 / (1 + threshold):
        return "faster"
    return "same" if found.high <= 1 + threshold else "unclear"


def _wrongness(contestant: Mapping[str, Any]) -> int:
    status = contestant["verdict"]["status"]
    return 0 if status in (RIGHT, UNCHECKED) else 1 if status == COARSE else 2


def _compare_pass(old: _Pass, new: _Pass, normalise: bool, threshold: float, confidence: float) -> Iterator[Finding]:
    others = _others(old, new) if normalise else []
    machine = machine_factors(others) if others else None
    drift = None if machine is None else float(np.median(machine[1]) / np.median(machine[0]))
    for before in old.contestants:
        if before["role"] != OURS:
            continue
        name = f"{old.name}: {before['name']}"
        after = next((x for x in new.contestants if x["name"] == before["name"]), None)
        old_ms = before["timing"]["median_ms"] if "timing" in before else None
        if after is None:
            yield Finding(name, old_ms, None, drift, None, "not compared", "the new file has no such contestant")
            continue
        new_ms = after["timing"]["median_ms"] if "timing" in after else None
        if _wrongness(after) > _wrongness(before):
            was, now = (x["verdict"]["status"] for x in (before, after))
            detail = f"was {was}, is {now}: {after['verdict']['detail']}"
            yield Finding(name, old_ms, new_ms, drift, None, "WRONG", detail)
        elif old_ms is None or new_ms is None:
            which = "either" if old_ms is new_ms else "the old" if old_ms is None else "the new"
            yield Finding(name, old_ms, new_ms, drift, None, "not compared", f"not timed in {which} file")
        else:
            samples = _samples(before), _samples(after)
            if machine is not None:
                samples = samples[0] / machine[0], samples[1] / machine[1]
            found = ratio_of_runs(*samples, confidence)
            yield Finding(name, old_ms, new_ms, drift, found, judge(found, threshold))


def _changed_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = (result["environment"]["versions"] for result in (old, new))
    names = dict.fromkeys([*before, *after])
    return [f"{x} {before.get(x)} → {after.get(x)}" for x in names if before.get(x) != after.get(x)]


def _refuse_if_incomparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old["kind"] != new["kind"]:
        raise UserError(f"not comparable: the old file holds {old['kind']}, the new one {new['kind']}")
    before, after = _machine(old), _machine(new)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            raise UserError(
                f"not comparable: {name} was {before.get(name)} and is {after.get(name)}; measure both on one machine"
            )


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], *, threshold: float = 0.03
) -> tuple[list[Finding], list[str]]:
    """Compare two results of kernels, of step, or of train.

    Returns:
        A finding for each of our contestants in each pass that both have, and remarks: what limits the comparison.

    Raises:
        UserError: they were measured on different machines, are of different kinds, or have no pass in common.
    """
    _refuse_if_incomparable(old, new)
    remarks = []
    changed = _changed_versions(old, new)
    if changed:
        remarks.append(f"peers may have changed ({', '.join(changed)}): the machine's share can not be divided out")
    before, after = _passes(old), _passes(new)
    pairs: list[tuple[_Pass, _Pass]] = []
    for name, old_pass in before.items():
        new_pass = after.get(name)
        if new_pass is None:
            remarks.append(f"not compared: {name}: the new file lacks it")
        elif old_pass.shape != new_pass.shape:
            different = [
                f"{x} {old_pass.shape.get(x)} → {new_pass.shape.get(x)}"
                for x in dict.fromkeys([*old_pass.shape, *new_pass.shape])
                if old_pass.shape.get(x) != new_pass.shape.get(x)
            ]
            remarks.append(f"not compared: {name}: another shape ({', '.join(different)})")
        else:
            pairs.append((old_pass, new_pass))
    remarks += [f"not compared: {name}: the old file lacks it" for name in after if name not in before]
    rows = sum(each["role"] == OURS for old_pass, _ in pairs for each in old_pass.contestants)
    confidence = 1 - (1 - CONFIDENCE) / max(1, rows)
    findings = [x for pair in pairs for x in _compare_pass(*pair, not changed, threshold, confidence)]
    if not findings:
        reasons = "; ".join(line for line in remarks if line.startswith("not compared")) or "they are empty"
        raise UserError(f"not comparable: no pass in common ({reasons})")
    if any(finding.machine is None and finding.ratio for finding in findings) and not changed:
        remarks.append("where machine is -, no peer was timed in both files: times are compared as they are")
    return findings, remarks


def _lines(findings: Sequence[Finding]) -> list[str]:
    table = [["", "old", "new", "machine", "new / old [95 % in all]", "verdict"]]
    for found in findings:
        table.append(
            [
                found.name,
                *("-" if ms is None else milliseconds(ms) for ms in (found.old_ms, found.new_ms)),
                "-" if found.machine is None else f"{found.machine:.3f}",
                "-" if found.ratio is None else interval(dataclasses.asdict(found.ratio)),
                found.verdict,
            ]
        )
    return columns(table)


def run(old: Path, new: Path, *, threshold: float, say: Callable[[str], None] = print) -> bool:
    """Compare two files and print what was found.

    Returns:
        True: nothing of ours got slower beyond noise, or wrong.

    Raises:
        UserError: a file is not a result of kernels, step or train, or the two can not be compared.
    """
    results = [result_json(read_result(path, *KINDS)) for path in (old, new)]
    try:
        findings, remarks = compare(*results, threshold=threshold)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{old} and {new}: one of them is not a whole result ({what})") from error
    say("\n".join(_lines(findings)))
    for found in findings:
        if found.detail:
            say(f"{found.name}: {found.detail}")
    for remark in remarks:
        say(remark)
    verdicts = [found.verdict for found in findings]
    count = {name: verdicts.count(name) for name in ("slower", "WRONG", "faster", "unclear", "not compared")}
    failed = count["slower"] + count["WRONG"]
    summary = ", ".join(f"{n} {name}" for name, n in count.items() if n)
    say(f"{'FAILED' if failed else 'passed'}: {len(findings)} compared" + (f": {summary}" if summary else ""))
    if count["unclear"]:
        say(f"unclear: noise hides whether it is more than {100 * threshold:g} % slower; measure longer, undisturbed")
    return not failed
