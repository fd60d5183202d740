"""Verifies contestants: result and gradients against the float64 oracle, on fresh random inputs (see `correctness`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .case import BOUND, Case, Contestant, Tensors
from .correctness import FAILED, RIGHT, UNCHECKED, WRONG, Verdict, allowance, relative_error, status


def one_line(error: Exception) -> str:
    """The type and the first line of an exception's message, short enough for a table."""
    reason = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {reason[0][:160]}"


class Judge:
    """The correct results for one set of inputs of a case, and plain PyTorch's distance from them."""

    def __init__(self, case: Case, inputs: Tensors, dropout_p: float) -> None:
        self.inputs, self.dropout_p = inputs, dropout_p
        self.oracle = case.oracle(inputs, dropout_p)
        plain = case.yardstick(inputs, dropout_p)
        self.allowance = {name: allowance(plain[name], right) for name, right in self.oracle.items()}

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
        found = status(ratios[worst])
        detail = "" if found == RIGHT else f"{worst} is {ratios[worst]:.1f} times as far from float64 as PyTorch"
        return Verdict(found, errors, ratios[worst], detail)


def poison(like: Tensors) -> None:
    """Fill freed memory of these sizes with NaN, so that an output that is allocated but not written contains NaN."""
    blocks = [torch.full(x.shape, math.nan, dtype=torch.float32, device=x.device) for x in like.values()]
    halves = [torch.full(x.shape, math.nan, dtype=torch.bfloat16, device=x.device) for x in like.values()]
    del blocks, halves


def verify(case: Case, contestant: Contestant, judges: Mapping[float, Judge]) -> Verdict:
    """Run a contestant once, forward and backward, and judge it.

    Args:
        judges: dropout probability → `Judge`: for the case's probability, and for 0, which contestants that do not
            replay our mask are checked with.
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
                    return Verdict(WRONG, detail="dropout is on and nothing was dropped")
    except Exception as error:  # a peer may raise anything; the others are still compared
        return Verdict(FAILED, detail=one_line(error))
    return verdict
