"""Result files: a dataclass for each kind, written whole or not at all, read only where this version knows the fields.

command                      kind           dataclass
fusebert bench kernels       kernels        KernelsResult
fusebert bench step          step           StepResult
fusebert bench train         train          TrainResult
fusebert bench fuse          fuse           FuseResult
fusebert bench embed         embed          EmbedResult
fusebert bench finetune      finetune       FinetuneResult
fusebert bench finetune-parity   finetune_parity   FinetuneParityResult
fusebert bench quality       quality        QualityResult
fusebert bench parity        train_parity   ParityResult
fusebert bench predict       predict        PredictResult
                             predict_op     OperatorPredictResult  (--op)
fusebert bench calibrate     calibrate      CalibrationResult
fusebert bench tune          race           RaceResult      (--kernels rows)
fusebert.bench.record        pretrain       PretrainResult
fusebert.bench.aot           aot            AotResult       (the file does not name its kind)
bench/campaign.sh            campaign       CampaignResult  (the file does not name its kind)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ...model.atomic import replace_file
from ...train.errors import UserError
from .case import OURS, PEER, Floor, Missing
from .ceilings import Ceilings, Drift
from .correctness import Verdict
from .machine import ClockSummary, Environment
from .prediction import KernelCalibration, KernelPrediction, OtherCall, PassPrediction, RaceCase, StepPrediction
from .serialise import FLAT, OPTIONAL, REST, from_json, to_json
from .settings import (
    EmbedBenchSettings,
    FinetuneBenchSettings,
    FinetuneParitySettings,
    FuseSettings,
    KernelsSettings,
    ParitySettings,
    PredictOperatorSettings,
    PredictSettings,
    QualitySettings,
    StepSettings,
    TrainSettings,
)
from .statistics import Difference, Ratio, Timing

SCHEMA = 1  # raise it when a field changes its meaning


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """A contestant's time in one pass.

    Attributes:
        ratio_to_ours: None where ours was not timed.
        peak_bytes: most memory beyond what was held before the call; None on a CPU.
        roofline: the pass's floor over the median.
    """

    timing: Timing
    ratio_to_ours: Ratio | None
    peak_bytes: int | None
    flops_per_s: float
    bytes_per_s: float
    roofline: float


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A contestant's training step.

    Attributes:
        tokens_per_s: real tokens.
        mfu: model FLOPs over the measured matmul rate.
        peak_bytes: most memory beyond weights and optimiser state; None on a CPU.
        threads: of PyTorch, on a CPU: the number that suits this contestant best. None: the environment's.
    """

    timing: Timing
    ratio_to_ours: Ratio | None
    tokens_per_s: float
    mfu: float
    micro_batches: int = 1
    peak_bytes: int | None = None
    threads: int | None = field(default=None, metadata=OPTIONAL)


@dataclasses.dataclass(frozen=True)
class FuseTime:
    """A model's time for a batch, a step, or all texts. ``tokens_per_s``: real tokens."""

    timing: Timing
    ratio_to_ours: Ratio | None
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class LossAtStep:
    """The mean training loss of the steps that end with ``step``."""

    step: int
    loss: float


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """How far a training run is after a turn: seconds and real tokens so far, mean loss of the turn's steps."""

    seconds: float
    step: int
    tokens: int
    loss: float


@dataclasses.dataclass(frozen=True)
class TrainTime:
    """A contestant's training run.

    Attributes:
        us_per_token: of each turn.
        loss_at_same_step: at the last step that all contestants reached.
        losses: of each step.
    """

    tokens_per_s: float
    us_per_token: tuple[float, ...]
    ratio_to_ours: Ratio | None
    steps: int
    tokens: int
    loss_at_same_step: LossAtStep
    heldout_loss: float
    peak_bytes: int | None
    losses: tuple[float, ...]
    curve: tuple[CurvePoint, ...]

    @property
    def timing(self) -> Timing:
        """Milliseconds for 1,000 tokens; a turn is a round."""
        return Timing.of(self.us_per_token, self.us_per_token, 1)


@dataclasses.dataclass(frozen=True)
class ContestantResult:
    """A contestant: its role ("ours", "peer", "bound"), its verdict and, in the subclasses, its ``time``."""

    name: str
    role: str
    verdict: Verdict

    @property
    def is_ours(self) -> bool:
        return self.role == OURS

    @property
    def problem(self) -> str | None:
        """Why the run has failed: ours is coarse, wrong or failed."""
        bad = self.is_ours and self.verdict.is_bad
        return f"{self.name} is {self.verdict.status} ({self.verdict.detail})" if bad else None


@dataclasses.dataclass(frozen=True)
class KernelContestant(ContestantResult):
    """``time``: None where it was not timed."""

    time: KernelTime | None = field(default=None, metadata=FLAT)


@dataclasses.dataclass(frozen=True)
class StepContestant(ContestantResult):
    """``time``: None where it was not timed."""

    time: StepTime | None = field(default=None, metadata=FLAT)


@dataclasses.dataclass(frozen=True)
class TrainContestant(ContestantResult):
    """``time``: None where it did not train."""

    time: TrainTime | None = field(default=None, metadata=FLAT)


@dataclasses.dataclass(frozen=True)
class FuseContestant(ContestantResult):
    """``time``: None where it was not timed."""

    time: FuseTime | None = field(default=None, metadata=FLAT)


@dataclasses.dataclass(frozen=True)
class FuseCase:
    """One pass ("forward", "forward+backward") of a model over a batch [B, N], ours first.

    Attributes:
        filled: share of the B·N slots that are no padding.
        products: time of the products of all linear layers with B·N rows over that with the real rows: what packing
            could gain if nothing else took time. None: not measured.
    """

    pass_name: str = field(metadata={"key": "pass"})
    batch: int
    seqlen: int
    filled: float
    contestants: tuple[FuseContestant, ...]
    products: Ratio | None = field(default=None, metadata=OPTIONAL)

    @property
    def words(self) -> str:
        return f"B={self.batch} N={self.seqlen}, {100 * self.filled:.0f} % filled"


@dataclasses.dataclass(frozen=True)
class PassResult:
    """One pass ("forward", "inference", "backward", "forward+backward") of one case, all contestants."""

    op: str
    case: str
    pass_name: str = field(metadata={"key": "pass"})
    dtype: str
    shape: dict[str, Any]
    dropout: float
    floor: Floor = field(metadata=FLAT)
    contestants: tuple[KernelContestant, ...]
    missing: tuple[Missing, ...]

    @property
    def ours(self) -> KernelContestant | None:
        """The first of our contestants."""
        return next((x for x in self.contestants if x.is_ours), None)

    @property
    def fastest_peer(self) -> KernelContestant | None:
        """Of the peers that were timed."""
        timed = [(x.time.timing.median_ms, x) for x in self.contestants if x.role == PEER and x.time]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None


@dataclasses.dataclass(frozen=True)
class ProfiledOperator:
    """An operator's share of a step. ``roofline``: floor / time; ``share``: of the time in operators."""

    name: str
    calls: float
    ms: float
    floor: Floor = field(metadata=FLAT)
    roofline: float | None
    share: float | None

    @property
    def lost_ms(self) -> float:
        """Time beyond the floor."""
        return self.ms - self.floor.floor_ms


@dataclasses.dataclass(frozen=True)
class Profile:
    """A step by operator, slowest first. ``ms``: wall-clock time under the profiler; ``operator_ms``: in operators."""

    ms: float
    operator_ms: float
    operators: tuple[ProfiledOperator, ...]


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Means over a step's batches. ``tokens``: real ones; ``padding_for_transformers``: share of padding in [B, N]."""

    tokens: float
    sequences: float
    masked: float
    padding_for_transformers: float
    flops: float


@dataclasses.dataclass(frozen=True)
class ParityRun:
    """A training run of `ParityResult`: the loss of each step."""

    losses: tuple[float, ...]
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class ParityVerdict:
    """Whether our losses follow the float32 run. One of the two allowances is None.

    Attributes:
        mean_drift, largest_drift: of |loss − loss₃₂| / loss₃₂ over the steps.
    """

    mean_drift: float
    largest_drift: float
    right: bool
    allowed_largest_drift: float | None = field(default=None, metadata=OPTIONAL)
    allowed_mean_drift: float | None = field(default=None, metadata=OPTIONAL)

    @property
    def criterion(self) -> tuple[str, float, float]:
        """What decides: ("mean" or "largest", the drift, the drift that is allowed)."""
        if self.allowed_mean_drift is not None:
            return "mean", self.mean_drift, self.allowed_mean_drift
        return "largest", self.largest_drift, self.allowed_largest_drift or 0.0


@dataclasses.dataclass(frozen=True)
class QualityPoint:
    """A held-out evaluation of a run. ``seconds``: of training, without evaluations and the start."""

    step: int
    tokens: int
    seconds: float
    mlm_loss: float
    nsp_accuracy: float | None


@dataclasses.dataclass(frozen=True)
class QualityRun:
    """A pretraining run of a recipe. ``finetuned_accuracy``: on the test texts of `quality_task`."""

    seed: int
    points: tuple[QualityPoint, ...]
    finetuned_accuracy: float | None = field(default=None, metadata=OPTIONAL)

    @property
    def last(self) -> QualityPoint:
        return self.points[-1]

    def at(self, seconds: float) -> QualityPoint:
        """The last evaluation that is not later."""
        return max((point for point in self.points if point.seconds <= seconds), key=lambda point: point.seconds)

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """(tokens, seconds) at which the held-out loss is first ``loss``, between evaluations by interpolation."""
        for before, after in itertools.pairwise(self.points):
            if after.mlm_loss <= loss:
                fall = before.mlm_loss - after.mlm_loss
                share = min(1.0, max(0.0, (before.mlm_loss - loss) / fall)) if fall > 0 else 1.0
                tokens = before.tokens + share * (after.tokens - before.tokens)
                return tokens, before.seconds + share * (after.seconds - before.seconds)
        return None


@dataclasses.dataclass(frozen=True)
class QualityRecipe:
    """The runs of a recipe, a seed each. ``options``: of pretrain, in words."""

    name: str
    options: str
    runs: tuple[QualityRun, ...]

    @property
    def mean_loss(self) -> float:
        """Of the last evaluations."""
        return math.fsum(run.last.mlm_loss for run in self.runs) / len(self.runs)


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """The corpus that a pretraining run read."""

    vocab_size: int
    train_tokens: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out figures of `train.run.evaluate`. ``mlm_loss`` in nats; ``nsp_accuracy`` None without sentence pairs."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_accuracy: float | None
    others: dict[str, Any] = field(default_factory=dict, metadata=REST)


@dataclasses.dataclass(frozen=True)
class PretrainReport:
    """What a report needs of ``fusebert pretrain``'s report.json; ``others`` keeps the rest of it."""

    model: str
    parameters: int
    precision: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    unigram_entropy: float
    before: HeldOut
    after: HeldOut
    verdict: str
    others: dict[str, Any] = field(default_factory=dict, metadata=REST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotAbout:
    """How kernels were compiled: date, architecture ("sm_90"), versions, hash of attention's sources."""

    date: str
    arch: str
    triton: str
    attention_sources: str | None = field(default=None, metadata=OPTIONAL)
    torch: str
    timed: str | None = field(default=None, metadata=OPTIONAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel as the compiler made it. Bytes are bytes, registers are a thread's.

    Attributes:
        tile: BLOCK_M and BLOCK_N, of those that the kernel has.
        instructions: in the SASS.
        limited_by: what runs out first in a multiprocessor: "registers", "shared memory", "warps", …
        matrix: "9 HGMMA": matrix instructions in the code.
        loads_128, stores_128: memory instructions of 128 bits.
        problems: in words.
    """

    case: str
    kernel: str
    tile: list[int] | None = None
    warps: int
    stages: int
    instructions: int | None = field(default=None, metadata=OPTIONAL)
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int | None = field(default=None, metadata=OPTIONAL)
    blocks_per_multiprocessor: int
    limited_by: str | None = field(default=None, metadata=OPTIONAL)
    matrix: str | None
    loads_128: int
    stores_128: int
    problems: list[str] = field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a campaign."""

    stage: str
    exit_status: int
    seconds: int


@dataclasses.dataclass
class Result:
    """What all results share: the name of their kind, and whether their files carry it."""

    kind: ClassVar[str]
    names_its_kind: ClassVar[bool] = True

    @property
    def problems(self) -> list[str]:
        """What is not right about our contestants; a command that finds any ends with status 1."""
        return []


class ContestantsResult(Result):
    """A result of one case, with its contestants."""

    contestants: Sequence[FuseContestant | StepContestant | TrainContestant]

    @property
    def problems(self) -> list[str]:
        return [row.problem for row in self.contestants if row.problem]


@dataclasses.dataclass
class KernelsResult(Result):
    """Of ``fusebert bench kernels``; it grows while the benchmark runs.

    Attributes:
        left_out: cases for which there was no time. did_not_fit: cases for which there was no memory.
        seconds: None where the run was cut short.
        nvidia_smi_after: as `GPU.nvidia_smi`, after the run.
    """

    kind = "kernels"
    environment: Environment
    settings: KernelsSettings
    ceilings: Ceilings
    results: list[PassResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    did_not_fit: list[str] = field(default_factory=list)
    clocks: ClockSummary | None = field(default=None, metadata=OPTIONAL)
    ceilings_drift: Drift | None = field(default=None, metadata=OPTIONAL)
    seconds: float | None = field(default=None, metadata=OPTIONAL)
    nvidia_smi_after: dict[str, str] | None = None

    @property
    def problems(self) -> list[str]:
        found = [f"{x.op} {x.case}: {row.problem}" for x in self.results for row in x.contestants if row.problem]
        return list(dict.fromkeys(found))  # one for all passes


@dataclasses.dataclass
class StepResult(ContestantsResult):
    """Of ``fusebert bench step``. ``left_out``: contestants for which there was no time."""

    kind = "step"
    environment: Environment
    settings: StepSettings
    ceilings: Ceilings
    batch: StepBatch
    contestants: list[StepContestant]
    left_out: list[str]
    seconds: float
    profile: Profile | None = None
    nvidia_smi_after: dict[str, str] | None = None


@dataclasses.dataclass
class TrainResult(ContestantsResult):
    """Of ``fusebert bench train``. ``unigram_entropy``: of the corpus, in nats."""

    kind = "train"
    environment: Environment
    settings: TrainSettings
    unigram_entropy: float
    contestants: list[TrainContestant]
    seconds: float
    clocks: ClockSummary | None = None
    nvidia_smi_after: dict[str, str] | None = None


@dataclasses.dataclass
class FuseResult(Result):
    """Of ``fusebert bench fuse``; it grows while the benchmark runs.

    Attributes:
        architecture: class, layers and width of the model.
        fused: what `model.fuse` reported.
        left_out: cases for which there was no time, or with a batch larger than ``--tokens``.
    """

    kind = "fuse"
    environment: Environment
    settings: FuseSettings
    architecture: str
    fused: str
    cases: list[FuseCase] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float | None = field(default=None, metadata=OPTIONAL)
    nvidia_smi_after: dict[str, str] | None = None

    @property
    def problems(self) -> list[str]:
        return [
            f"{case.words}, {case.pass_name}: {x.problem}" for case in self.cases for x in case.contestants if x.problem
        ]


@dataclasses.dataclass
class EmbedResult(ContestantsResult):
    """Of ``fusebert bench embed``: all texts to vectors, ours first.

    Attributes:
        architecture: size of the vectors, pooling, the most tokens of a text.
        tokens: of all texts, special tokens included, without padding.
        padding_sorted, padding_unsorted: share of the slots of sentence-transformers' batches that is padding.
    """

    kind = "embed"
    environment: Environment
    settings: EmbedBenchSettings
    architecture: str
    tokens: int
    padding_sorted: float
    padding_unsorted: float
    contestants: tuple[FuseContestant, ...]
    seconds: float
    nvidia_smi_after: dict[str, str] | None = None


@dataclasses.dataclass
class FinetuneResult(ContestantsResult):
    """Of ``fusebert bench finetune``: steps, ours first.

    Attributes:
        mean_tokens: of a text.
        losses: of the first steps, in float32 without dropout, ours and Transformers'.
    """

    kind = "finetune"
    environment: Environment
    settings: FinetuneBenchSettings
    architecture: str
    mean_tokens: float
    losses: dict[str, list[float]]
    contestants: tuple[FuseContestant, ...]
    seconds: float
    nvidia_smi_after: dict[str, str] | None = None


@dataclasses.dataclass
class FinetuneParityResult(Result):
    """Of ``fusebert bench finetune-parity``: dev accuracies of ours and of Transformers', a run a seed.

    Attributes:
        mean_tokens: of a training text.
        difference: ours − theirs.
    """

    kind = "finetune_parity"
    environment: Environment
    settings: FinetuneParitySettings
    architecture: str
    classes: int
    train_texts: int
    dev_texts: int
    mean_tokens: float
    accuracy: dict[str, list[float]]
    difference: Difference
    seconds: float
    nvidia_smi_after: dict[str, str] | None = None

    @property
    def problems(self) -> list[str]:
        found = self.difference
        if found.low <= 0.0 <= found.high:
            return []
        return [f"dev accuracies differ by more than the noise of a seed: {found.mean:+.4f}"]


@dataclasses.dataclass
class QualityResult(Result):
    """Of ``fusebert bench quality``; it grows while the benchmark runs. ``device``: what a run printed."""

    kind = "quality"
    environment: Environment
    settings: QualitySettings
    corpus: CorpusSummary
    unigram_entropy: float
    recipes: list[QualityRecipe] = field(default_factory=list)
    device: str = ""
    seconds: float | None = field(default=None, metadata=OPTIONAL)

    @property
    def target(self) -> float:
        """The mean of the losses that are to be reached."""
        return self.recipes[0].mean_loss

    def at_equal_time(self, recipe: QualityRecipe, read: Callable[[QualityPoint], float | None]) -> list[float]:
        """What ``read`` finds of each run less what it finds of the first recipe's run of the same seed, at the last
        evaluations before the earlier of their ends."""
        found = []
        for run, first in zip(recipe.runs, self.recipes[0].runs, strict=False):
            seconds = min(run.last.seconds, first.last.seconds)
            ours, theirs = read(run.at(seconds)), read(first.at(seconds))
            if ours is not None and theirs is not None:
                found.append(ours - theirs)
        return found

    def cost(self, recipe: QualityRecipe, which: int) -> tuple[float, float, float] | None:
        """Tokens (``which`` 0) or seconds (1) until the last held-out loss of the first recipe's run of the same seed,
        over what that run takes: mean, least and most over the seeds. None if one does not reach it."""
        shares = []
        for run, first in zip(recipe.runs, self.recipes[0].runs, strict=False):
            reached = run.reaches(first.last.mlm_loss)
            if reached is None:
                return None
            shares.append(reached[which] / (first.last.tokens, first.last.seconds)[which])
        return math.fsum(shares) / len(shares), min(shares), max(shares)


@dataclasses.dataclass
class ParityResult(Result):
    """Of ``fusebert bench parity``. ``runs``: ours first."""

    kind = "train_parity"
    environment: Environment
    settings: ParitySettings
    runs: dict[str, ParityRun]
    verdict: ParityVerdict
    speed_up: float
    nvidia_smi_after: dict[str, str] | None = None

    @property
    def problems(self) -> list[str]:
        return [] if self.verdict.right else ["our training run departs from Transformers'"]


@dataclasses.dataclass
class PretrainResult(Result):
    """Of a finished ``fusebert pretrain``. ``settings`` and ``shape`` are as its log has them."""

    kind = "pretrain"
    environment: Environment
    settings: dict[str, Any]
    shape: dict[str, Any]
    corpus: CorpusSummary
    report: PretrainReport


@dataclasses.dataclass
class AotResult(Result):
    """Of ``python -m fusebert.bench.aot``: what the compiler makes of every kernel for one architecture."""

    kind = "aot"
    names_its_kind = False
    about: AotAbout
    kernels: list[CompiledKernel]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictAbout:
    """How a prediction was made: date, commit, versions, and the rates of the GPU (`gpus.GPU`)."""

    date: str
    commit: str | None
    triton: str
    torch: str
    gpu: dict[str, Any]


@dataclasses.dataclass
class PredictResult(Result):
    """Of ``fusebert bench predict``: nothing in it is measured. ``step``: None where a kernel is not predicted."""

    kind = "predict"
    about: PredictAbout
    settings: PredictSettings
    kernels: list[KernelPrediction]
    others: list[OtherCall]
    step: StepPrediction | None


@dataclasses.dataclass
class OperatorPredictResult(Result):
    """Of ``fusebert bench predict --op``: nothing in it is measured. Passes in the order of the shapes."""

    kind = "predict_op"
    about: PredictAbout
    settings: PredictOperatorSettings
    passes: list[PassPrediction]

    @property
    def kernels(self) -> list[KernelPrediction]:
        """Of all passes; ``call`` also names the shape."""
        return [
            dataclasses.replace(row, call=f"{each.case}, {row.call}") for each in self.passes for row in each.kernels
        ]


@dataclasses.dataclass
class CalibrationResult(Result):
    """Of ``fusebert bench calibrate``; it grows while the benchmark runs.

    Attributes:
        ceilings: the rates that the prediction takes from ``about.gpu``, measured here.
        kernels: those that take most of a step first.
        left_out: kernels for which there was no time.
        seconds: None where the run was cut short.
    """

    kind = "calibrate"
    environment: Environment
    about: PredictAbout
    settings: PredictSettings
    ceilings: Ceilings
    kernels: list[KernelCalibration] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    clocks: ClockSummary | None = field(default=None, metadata=OPTIONAL)
    seconds: float | None = field(default=None, metadata=OPTIONAL)
    nvidia_smi_after: dict[str, str] | None = None

    @property
    def problems(self) -> list[str]:
        return [f"{x.prediction.call}: {x.prediction.kernel}: {x.failed}" for x in self.kernels if x.failed]


@dataclasses.dataclass
class RaceResult(Result):
    """Of ``fusebert bench tune --kernels rows``; it grows while the benchmark runs.

    Attributes:
        gpu: that the times are predicted for. tokens: of each call.
        races: the largest expected gain first.
        left_out: races for which there was no time.
        seconds: None where the run was cut short.
    """

    kind = "race"
    environment: Environment
    gpu: str
    dtype: str
    tokens: int
    races: list[RaceCase] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float | None = field(default=None, metadata=OPTIONAL)

    @property
    def problems(self) -> list[str]:
        return [
            f"{x.kernel} {x.shape} {row.config}: {row.failed}"
            for x in self.races
            for row in x.contestants[:1]
            if row.failed
        ]


@dataclasses.dataclass
class CampaignResult(Result):
    """Of bench/campaign.sh. ``gaps``: what could not run, and the reason."""

    kind = "campaign"
    names_its_kind = False
    commit: str | None
    seconds: int
    stages: list[Stage]
    gaps: list[str] = field(default_factory=list)


ALL_KINDS: tuple[type[Result], ...] = (
    AotResult,
    CalibrationResult,
    CampaignResult,
    EmbedResult,
    FinetuneParityResult,
    FinetuneResult,
    FuseResult,
    KernelsResult,
    OperatorPredictResult,
    ParityResult,
    PredictResult,
    PretrainResult,
    QualityResult,
    RaceResult,
    StepResult,
    TrainResult,
)
R = TypeVar("R", bound=Result)


def result_json(result: Result) -> dict[str, Any]:
    """``result`` as JSON types."""
    about = {"schema": SCHEMA, "kind": result.kind} if result.names_its_kind else {}
    found: dict[str, Any] = about | to_json(result)
    return found


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` to ``path``, replacing it in one step, so that a run cut short leaves its last whole state."""
    content = result_json(result)
    if isinstance(result, AotResult):  # a kernel a line, so that a diff shows which kernels changed
        lines = ",\n".join(json.dumps(kernel, allow_nan=False) for kernel in content["kernels"])
        text = f'{{"about": {json.dumps(content["about"])}, "kernels": [\n{lines}\n]}}\n'
    else:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _kind(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    for kind, fields in ((AotResult.kind, ("about", "kernels")), (CampaignResult.kind, ("stages", "seconds"))):
        if "kind" not in content and all(name in content for name in fields):
            return kind
    return content.get("kind")


def read_result(path: Path, *kinds: type[R]) -> R:
    """The result in ``path``.

    Args:
        kinds: those that the caller can use.

    Raises:
        UserError: there is no such file; or it is not a result file, not whole, of another kind or version.
    """
    give = "give a file that fusebert bench ... --out wrote"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {give}") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise UserError(f"{path}: not JSON ({error}); {give}") from error
    kind = _kind(content)
    if kind is None:
        raise UserError(f"{path}: not a result file; {give}")
    chosen = next((each for each in kinds if each.kind == kind), None)
    if chosen is None:
        allowed = ", ".join(sorted(each.kind for each in kinds))
        raise UserError(f"{path}: holds a result of kind {kind!r}; this command takes {allowed}")
    schema = content.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise UserError(
            f"{path}: written as version {schema!r} of the result files; this fusebert reads version {SCHEMA}"
        )
    try:
        return from_json(chosen, content)
    except ValueError as error:
        raise UserError(f"{path}: not a whole {kind} result: {error}") from error
