"""``fusebert bench compare`` on two predictions: whether a kernel issues, or takes by prediction, more than it did.

The figures are counts, so there is no noise: anything above 1 + threshold fails. A kernel is the i-th of its name in
its operator, so that another tile is compared with the tile it replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...train.errors import UserError
from ..measure.prediction import KernelPrediction
from ..measure.result import OperatorPredictResult, PredictResult
from .columns import Column

Prediction = PredictResult | OperatorPredictResult
QUANTITIES = ("issue_slots", "bound_us", "sum_us", "spill_bytes")


@dataclasses.dataclass(frozen=True)
class Change:
    """A predicted quantity, before and after. ``verdict``: "slower", "faster", "same" or "refused"."""

    name: str
    quantity: str
    old: float
    new: float
    verdict: str

    @property
    def ratio(self) -> float | None:
        return self.new / self.old if self.old else None


CHANGES: tuple[Column[Change], ...] = (
    Column("predicted", lambda x: x.name, words=True),
    Column("quantity", lambda x: x.quantity, words=True),
    Column("old", lambda x: x.old, "{:,.1f}"),
    Column("new", lambda x: x.new, "{:,.1f}"),
    Column("new / old", lambda x: x.ratio, "{:.3f}"),
    Column("verdict", lambda x: x.verdict, words=True),
)


def _judge(old: float, new: float, threshold: float) -> str:
    if new > old * (1 + threshold):
        return "slower"
    return "faster" if new * (1 + threshold) < old else "same"


def _by_name(rows: list[KernelPrediction]) -> dict[str, KernelPrediction]:
    found: dict[str, KernelPrediction] = {}
    for row in rows:
        name, i = f"{row.call}: {row.kernel}", 1
        while (key := f"{name} {i}") in found:
            i += 1
        found[key] = row
    return found


def _kernel_changes(name: str, old: KernelPrediction, new: KernelPrediction, threshold: float) -> Iterator[Change]:
    if new.refused and not old.refused:
        yield Change(name, new.refused, old.bound_us, 0.0, "refused")
        return
    for quantity in QUANTITIES:
        was, is_now = getattr(old, quantity), getattr(new, quantity)
        if was or is_now:
            yield Change(name, quantity, was, is_now, _judge(was, is_now, threshold))


def compare_predictions(old: Prediction, new: Prediction, threshold: float) -> tuple[list[Change], list[str]]:
    """A change for each quantity of each kernel that both have and of the step, and remarks.

    Raises:
        UserError: step and operator are mixed, the settings or the GPU's rates differ, or no kernel is in both.
    """
    if type(old) is not type(new):
        raise UserError("not comparable: one is the prediction of a step, the other of an operator")
    for what, was, is_now in (
        ("settings", dataclasses.asdict(old.settings), dataclasses.asdict(new.settings)),
        ("rates of the GPU", old.about.gpu, new.about.gpu),
    ):
        different = [
            f"{key} {was.get(key)} → {is_now.get(key)}" for key in {**was, **is_now} if was.get(key) != is_now.get(key)
        ]
        if different:
            raise UserError(f"not comparable: {what} differ: {', '.join(different)}")
    before, after = _by_name(old.kernels), _by_name(new.kernels)
    changes = [
        x for name in before if name in after for x in _kernel_changes(name, before[name], after[name], threshold)
    ]
    if not changes:
        raise UserError("not comparable: no kernel in common")
    if isinstance(old, PredictResult) and isinstance(new, PredictResult) and old.step and new.step:
        changes += [
            Change("step", name, was, is_now, _judge(was, is_now, threshold))
            for name in ("best_us", "worst_us")
            for was, is_now in [(getattr(old.step, name), getattr(new.step, name))]
        ]
    remarks = [f"not compared: {name}: the new file lacks it" for name in before if name not in after]
    remarks += [f"not compared: {name}: the old file lacks it" for name in after if name not in before]
    if old.about.triton != new.about.triton:
        remarks.append(f"compiled with Triton {old.about.triton} and {new.about.triton}")
    return changes, remarks
