"""When a result is right: its distance from float64, beside the distance of plain PyTorch at the same dtype.

error      ‖x − oracle‖ / ‖oracle‖, with the oracle in float64
allowance  max(PyTorch's error on the same inputs, error of the oracle rounded to the dtype of PyTorch's result)
right      error ≤ 2 · allowance
coarse     error ≤ 8 · allowance: timed, and reported as coarse
wrong      beyond that, or not finite, or of the wrong shape: not timed
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field

import torch
from torch import Tensor

RIGHT_FACTOR, COARSE_FACTOR = 2.0, 8.0
RIGHT, COARSE, WRONG, FAILED, UNCHECKED = "right", "coarse", "wrong", "failed", "unchecked"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How near to the oracle a contestant comes.

    Attributes:
        status: "right", "coarse", "wrong", "failed" (it raised) or "unchecked" (a bound computes no result).
        errors: relative error of the result and of each gradient.
        versus_torch: the largest of error / PyTorch's error; NaN where nothing was compared.
        detail: the reason for any status but "right", in one line.
    """

    status: str
    errors: dict[str, float] = field(default_factory=dict)
    versus_torch: float = field(default=math.nan, metadata={"key": "error_versus_torch"})
    detail: str = ""

    @property
    def may_be_timed(self) -> bool:
        return self.status in (RIGHT, COARSE, UNCHECKED)

    @property
    def is_bad(self) -> bool:
        """Coarse, wrong or failed."""
        return self.status not in (RIGHT, UNCHECKED)

    @property
    def largest_error(self) -> float | None:
        """Of the errors that are numbers; None without any."""
        return max((x for x in self.errors.values() if not math.isnan(x)), default=None)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64; NaN where ``actual`` is not finite."""
    oracle = oracle.detach().double()
    difference = torch.linalg.vector_norm(actual.detach().to(oracle) - oracle)
    return float(difference / torch.linalg.vector_norm(oracle).clamp_min(torch.finfo(torch.float64).tiny))


def rounding_error(oracle: Tensor, dtype: torch.dtype) -> float:
    """Relative error of ``oracle`` rounded to ``dtype``; for scalars and exact roundings the unit roundoff."""
    unit_roundoff = torch.finfo(dtype).eps / 2
    return unit_roundoff if oracle.numel() == 1 else relative_error(oracle.to(dtype), oracle) or unit_roundoff


def allowance(torch_result: Tensor, oracle: Tensor, *, roundings: int = 1) -> float:
    """The error that a verdict is measured in: PyTorch's, and at least ``roundings`` roundings to its dtype.

    Args:
        roundings: more than one for results so small that PyTorch's own error is chance: as many as the computation
            makes in a row.
    """
    return max(relative_error(torch_result, oracle), roundings * rounding_error(oracle, torch_result.dtype))


def status(versus_torch: float) -> str:
    """RIGHT, COARSE or WRONG, from error / allowance."""
    return RIGHT if versus_torch <= RIGHT_FACTOR else COARSE if versus_torch <= COARSE_FACTOR else WRONG
