"""What is predicted of a kernel and of a step, and what a GPU measures beside it: typed rows of result files.

`KernelPrediction`, `OtherCall` and `StepPrediction` hold nothing measured; `KernelCalibration` and `RaceCase` set a
prediction beside a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field

from .serialise import OPTIONAL
from .statistics import Ratio, Timing


@dataclasses.dataclass(frozen=True)
class KernelPrediction:
    """A launch of one of our kernels on one GPU.

    Attributes:
        call: the operator that launches it, with what decides its shape.
        launches: in a step.
        programs: of the grid. blocks: resident on a multiprocessor. waves: programs over all resident blocks.
        issue_slots, flops, hbm_bytes: of a launch.
        us: microseconds of a launch if nothing but this resource took time: "issue", "alu" (integers, logic,
            comparisons), "fma" (fp32 and integer multiply-adds), "special", "tensor", "shared" (with L1), "l2", "hbm".
        refused: why it is not predicted; then there are no times.
    """

    call: str
    kernel: str
    launches: int
    tile: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    programs: int
    waves: float
    issue_slots: float
    flops: float
    hbm_bytes: float
    us: dict[str, float]
    roofline_us: float
    refused: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def bound_us(self) -> float:
        """If all resources overlap: the largest."""
        return max(self.us.values(), default=0.0)

    @property
    def limiter(self) -> str:
        return max(self.us, key=lambda name: self.us[name], default="-")

    @property
    def sum_us(self) -> float:
        """If none overlap. Instructions share the issue slots, and what comes from HBM passes L2: those count once."""
        if not self.us:
            return 0.0
        instructions = max(self.us[name] for name in ("issue", "alu", "fma"))
        memory = max(self.us[name] for name in ("l2", "hbm"))
        return instructions + self.us["special"] + self.us["tensor"] + self.us["shared"] + memory


@dataclasses.dataclass(frozen=True)
class OtherCall:
    """An operator of the step that is not ours: FLOPs at the rate of matrix products, or bytes at the copy rate."""

    name: str
    calls: int
    flops: float
    bytes: float
    us: float


@dataclasses.dataclass(frozen=True)
class StepPrediction:
    """A training step on one GPU. ``tokens``: real ones; the times are of the whole step, in microseconds.

    Attributes:
        products_us: matrix products at the rate of a large one. others_us: PyTorch's other operators at the copy rate.
        kernels_bound_us, kernels_sum_us: ours. launches_us: of all kernels.
        floor_us: the lower bound of docs/step.md: FLOPs at the product rate + the bytes between them at the copy rate.
    """

    tokens: float
    products_us: float
    others_us: float
    kernels_bound_us: float
    kernels_sum_us: float
    launches: int
    launches_us: float
    floor_us: float

    @property
    def best_us(self) -> float:
        """If each of our kernels overlaps all of its resources."""
        return self.products_us + self.others_us + self.kernels_bound_us + self.launches_us

    @property
    def worst_us(self) -> float:
        """If none of our kernels overlaps any. Not an upper bound of the time: latency is not counted."""
        return self.products_us + self.others_us + self.kernels_sum_us + self.launches_us


@dataclasses.dataclass(frozen=True)
class PassPrediction:
    """A pass of an operator at a shape, on one GPU.

    Attributes:
        case: the shape as ``--shapes`` takes it. which: "forward", "backward" or "forward+backward".
        others: operators of PyTorch that ours calls.
        floor_us: the least time at the GPU's rates: max(FLOPs / product rate, bytes / copy rate). floor_limit: which.
    """

    case: str
    which: str
    kernels: list[KernelPrediction]
    others: list[OtherCall]
    floor_us: float
    floor_limit: str

    @property
    def refused(self) -> bool:
        """Whether a kernel is not predicted; then neither is the pass."""
        return any(row.refused for row in self.kernels)

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.kernels) + sum(row.calls for row in self.others)

    @property
    def others_us(self) -> float:
        return sum(row.us for row in self.others)

    @property
    def bound_us(self) -> float:
        """If each of our kernels overlaps all of its resources. Launches are not counted."""
        return self.others_us + sum(row.launches * row.bound_us for row in self.kernels)

    @property
    def sum_us(self) -> float:
        """If none of our kernels overlaps any."""
        return self.others_us + sum(row.launches * row.sum_us for row in self.kernels)

    @property
    def limiter(self) -> str:
        """What bounds the kernel that takes longest."""
        longest = max(self.kernels, key=lambda row: row.launches * row.bound_us, default=None)
        return longest.limiter if longest else "-"


@dataclasses.dataclass(frozen=True)
class KernelCalibration:
    """A predicted launch and its measured time on that GPU.

    Attributes:
        timing: None where the launch failed, with the reason in ``failed``.
        over_bound, over_sum: measured over predicted, medians of the rounds with their intervals.
    """

    prediction: KernelPrediction
    timing: Timing | None
    over_bound: Ratio | None = None
    over_sum: Ratio | None = None
    failed: str | None = field(default=None, metadata=OPTIONAL)


@dataclasses.dataclass(frozen=True)
class RaceContestant:
    """A configuration of a kernel. ``ratio_to_launched``: its time over that of what is launched today."""

    config: str
    prediction: KernelPrediction
    timing: Timing | None = None
    ratio_to_launched: Ratio | None = None
    failed: str | None = field(default=None, metadata=OPTIONAL)


@dataclasses.dataclass(frozen=True)
class RaceCase:
    """A kernel at a shape: the configuration that is launched today, then candidates.

    Attributes:
        per_step: launches in a training step of the preset with this shape.
    """

    kernel: str
    shape: str
    per_step: int
    contestants: tuple[RaceContestant, ...]

    @property
    def expected_gain_us(self) -> float:
        """Of a step: predicted sum of what is launched, less the smallest predicted sum of a candidate."""
        launched, *others = (row.prediction for row in self.contestants)
        sums = [row.sum_us for row in others if not row.refused]
        return 0.0 if launched.refused or not sums else self.per_step * (launched.sum_us - min(sums))
