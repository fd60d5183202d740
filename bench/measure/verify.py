"""Right before fast: every contestant's result and gradients against the float64 oracle, on fresh random inputs.

The rule is the test-suite's: a tensor is right when ‖x − oracle‖ / ‖oracle‖ is at most twice the error of plain PyTorch
at the same dtype on the same inputs, or twice the rounding of the oracle to the dtype of PyTorch's result where that is
larger (for a single number, whose own rounding is luck: the dtype's unit roundoff). Up to 8 times is "coarse": timed,
and said so. Beyond that, or not finite, or of the wrong shape, is "wrong": not timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .case import BOUND, Case, Contestant, Tensors

RIGHT_FACTOR, COARSE_FACTOR = 2.0, 8.0
RIGHT, COARSE, WRONG, FAILED, UNCHECKED = "right", "coarse", "wrong", "failed", "unchecked"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How right a contestant is.

    Attributes:
        status: "right", "coarse", "wrong", "failed" (it raised) or "unchecked" (a bound computes no result).
        errors: relative error to the oracle of the result and of each gradient.
        versus_torch: the largest of errors / PyTorch's.
        detail: what is wrong, in a line; empty when nothing is.
    """

    status: str
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versus_torch: float = math.nan
    detail: str = ""

    @property
    def may_be_timed(self) -> bool:
        return self.status in (RIGHT, COARSE, UNCHECKED)

    def as_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "errors": dict(self.errors),
            "error_versus_torch": None if math.isnan(self.versus_torch) else self.versus_torch,
            "detail": self.detail,
        }


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64; NaN when ``actual`` is not finite."""
    difference = torch.linalg.vector_norm(actual.detach().double() - oracle)
    return float(difference / torch.linalg.vector_norm(oracle).clamp_min(torch.finfo(torch.float64).tiny))


def _rounding(right: Tensor, dtype: torch.dtype) -> float:
    unit_roundoff = torch.finfo(dtype).eps / 2
    if right.numel() == 1:
        return unit_roundoff
    return relative_error(right.to(dtype), right) or unit_roundoff  # where dtype happens to hold it exactly


def one_line(error: Exception) -> str:
    """What an exception says, short enough for a table."""
    reason = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {reason[0][:160]}"


class Judge:
    """What is right for one set of inputs of a case, and how near to it plain PyTorch comes."""

    def __init__(self, case: Case, inputs: Tensors, dropout_p: float) -> None:
        self.inputs, self.dropout_p = inputs, dropout_p
        self.oracle = case.oracle(inputs, dropout_p)
        plain = case.yardstick(inputs, dropout_p)
        self.allowance = {
            name: max(relative_error(plain[name], right), _rounding(right, plain[name].dtype))
            for name, right in self.oracle.items()
        }

    def judge(self, results: Tensors) -> Verdict:
        """Compare a contestant's named results."""
        if results.keys() != self.oracle.keys():
            return Verdict(WRONG, detail=f"returned {sorted(results)}, expected {sorted(self.oracle)}")
        for name, right in self.oracle.items():
            if results[name].shape != right.shape:
                got = tuple(results[name].shape)
                return Verdict(WRONG, detail=f"{name} has shape {got}, expected {tuple(right.shape)}")
        errors = {name: relative_error(results[name], right) for name, right in self.oracle.items()}
        ratios = {name: error / self.allowance[name] for name, error in errors.items()}
        infinite = [name for name, value in ratios.items() if not math.isfinite(value)]
        if infinite:
            return Verdict(WRONG, errors, math.nan, f"not finite: {', '.join(infinite)}")
        worst = max(ratios, key=lambda name: ratios[name])
        status = RIGHT if ratios[worst] <= RIGHT_FACTOR else COARSE if ratios[worst] <= COARSE_FACTOR else WRONG
        detail = "" if status == RIGHT else f"{worst} is {ratios[worst]:.1f} times as far from float64 as PyTorch"
        return Verdict(status, errors, ratios[worst], detail)


def poison(like: Tensors) -> None:
    """Leave NaN in freed memory of these sizes, where an output that is allocated and not written will show it."""
    blocks = [torch.full(x.shape, math.nan, dtype=torch.float32, device=x.device) for x in like.values()]
    halves = [torch.full(x.shape, math.nan, dtype=torch.bfloat16, device=x.device) for x in like.values()]
    del blocks, halves


def verify(case: Case, contestant: Contestant, judges: Mapping[float, Judge]) -> Verdict:
    """Run a contestant once, forward and backward, and judge it.

    Args:
        judges: dropout probability → `Judge`; one for the case's own, and one for 0 for those whose mask is their own.
    """
    if contestant.role == BOUND:
        return Verdict(UNCHECKED)
    judge = judges[case.dropout_p if contestant.replays_dropout else 0.0]
    poison(judge.oracle)
    try:
        with contestant.context():
            run = contestant.bind(judge.inputs, judge.dropout_p)
            out = run.forward()
            verdict = judge.judge(run.named(out, run.backward(out)))
            del out
            if verdict.may_be_timed and judge.dropout_p != case.dropout_p:
                dropping = contestant.bind(judge.inputs, case.dropout_p).forward()
                if not bool(torch.isfinite(dropping).all()):
                    return Verdict(WRONG, detail="not finite with dropout on")
                if torch.equal(dropping, run.forward()):
                    return Verdict(WRONG, detail="dropout was asked for and nothing was dropped")
    except Exception as error:  # a peer may raise anything: it is out of the race, the race goes on
        return Verdict(FAILED, detail=one_line(error))
    return verdict


__all__ = [
    "COARSE",
    "COARSE_FACTOR",
    "FAILED",
    "RIGHT",
    "RIGHT_FACTOR",
    "UNCHECKED",
    "WRONG",
    "Judge",
    "Verdict",
    "one_line",
    "poison",
    "relative_error",
    "verify",
]
