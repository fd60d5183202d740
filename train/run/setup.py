"""Builds everything that a pretraining run needs from its settings."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...model.batch import PackedBatch
from ...model.fp8 import use_fp8
from ...model.hf.format import WEIGHTS_FILE
from ...model.pretraining import BertForPreTraining
from ..batches.batch_maker import MLM_PROBABILITY, BatchMaker, fit_shape
from ..batches.dataset import PackedExamples, heldout_batches
from ..batches.shape import BatchShape
from ..corpus.format import file_sha256
from ..corpus.reader import Corpus
from ..step.average import WeightAverage
from ..step.distributed import Ranks
from ..step.flops import matmul_rate, matmul_words, rate_words
from ..step.optim import make_optimizer
from ..step.precision import set_float32_products
from ..step.sharding import distribute
from ..step.step import TrainingStep
from .checkpoint import TrainerState, last_good, load_checkpoint
from .clock import Clock, Schedule
from .first_model import make_model, name_of_model
from .inputs import RunInputs
from .lock import RunLock
from .log import RunLog
from .manifest import check_repetition, write_manifest
from .phases import Phase, in_words
from .phases import phases as parse_phases
from .places import check_places
from .plan import Plan, resolve
from .resume import check_identity, describe_changes, find_checkpoint, keep_batch_sizes, run_identity
from .settings import PretrainSettings

MAX_LANES = 16  # each lane holds a chunk in memory; with more ranks than lanes some ranks make the same chunks
HELDOUT_TOKENS = {"cpu": 65_536, "cuda": 1_048_576}  # the most that an evaluation uses


@dataclasses.dataclass
class PhaseData:
    """What a run reads in one phase.

    Attributes:
        seqlen, end: of the `Phase`.
        examples: training batches.
        heldout: batches for evaluation, the same in every rank.
    """

    seqlen: int
    end: float
    shape: BatchShape
    examples: PackedExamples
    heldout: list[PackedBatch]


@dataclasses.dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        resume_command: the command that continues the run, for messages.
        settings: the command line's, with the batch sizes of the continued run.
        phases: one for each length of --seqlen.
        matmul_rate: FLOP/s of all ranks, measured; the denominator of MFU.
        matmul: what was measured, in words.
        average: of the weights, with --ema: what is evaluated and exported.
        inputs: what the run keeps of the corpus.
        lock: on the run's folder; on rank 0 only.
        log: on rank 0 only, and not in a run that had ended before.
        log_error: why a record could not be written. The loop then saves and ends the run.
    """

    ranks: Ranks
    resume_command: str
    settings: PretrainSettings
    plan: Plan
    corpus: Corpus
    phases: list[PhaseData]
    model: BertForPreTraining
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    step: TrainingStep
    state: TrainerState
    clock: Clock
    schedule: Schedule
    matmul_rate: float
    matmul: str
    inputs: RunInputs
    lock: RunLock | None
    log: RunLog | None
    log_error: OSError | None = None

    @property
    def phase(self) -> PhaseData:
        """The phase that the run is in."""
        return self.phases[len(self.state.phases)]

    def enter_phase(self) -> bool:
        """Goes on to the next phase if it is time. Call it between two steps; the same in all ranks."""
        spent, before = self.schedule.spent(), len(self.state.phases)
        while self.phase.end < 1.0 and spent >= self.phase.end - 1e-9:
            self.state.phases.append(self.state.batches)
        return len(self.state.phases) > before

    @property
    def micro_batches(self) -> int:
        """Of the next step, on all ranks."""
        return self.plan.step_sizes[len(self.state.step_sizes)].size

    def change_step_size(self) -> bool:
        """Goes on to the next size of --batch-tokens if it is time. As `enter_phase`."""
        spent, before = self.schedule.spent(), len(self.state.step_sizes)
        while (end := self.plan.step_sizes[len(self.state.step_sizes)].end) < 1.0 and spent >= end - 1e-9:
            self.state.step_sizes.append(self.state.step)
        return len(self.state.step_sizes) > before

    def epochs(self) -> float:
        """How often the training text was read."""
        ends = [*self.state.phases, self.state.batches]
        begins = [0, *self.state.phases]
        used = zip(self.phases, begins, ends, strict=False)
        return sum((end - begin) / phase.examples.batches_per_epoch for phase, begin, end in used)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.settings.out / "checkpoints"

    @property
    def device_words(self) -> str:
        """The devices of all ranks, in words."""
        device = self.plan.device
        threads = torch.get_num_threads()
        name = f"CPU ({threads} thread{'s' if threads > 1 else ''})"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        return name if self.ranks.alone else f"{self.ranks.world_size} × {name}, {self.settings.parallel.upper()}"

    def record(self, kind: str, step: int | None = None, **fields: Any) -> None:
        """Writes a log record, on rank 0.

        Args:
            step: None: the current step.
        """
        if self.log is not None and self.log_error is None:
            try:
                self.log.write(kind, self.state.step if step is None else step, **fields)
            except OSError as error:
                self.log_error = error

    def say(self, text: str) -> None:
        """Prints above the progress bar, on rank 0."""
        if self.ranks.first:
            tqdm.write(text)

    def warn(self, text: str) -> None:
        """Prints a warning on stderr, on rank 0."""
        if self.ranks.first:
            tqdm.write(f"fusebert: warning: {text}", file=sys.stderr)

    def last_good(self) -> str:
        """`checkpoint.last_good` of this run."""
        return last_good(self.checkpoints)

    def close(self) -> None:
        """Closes the log and releases the run's folder."""
        if self.log is not None:
            self.log.close()
        if self.lock is not None:
            self.lock.release()


def set_up(settings: PretrainSettings, resume_command: str, ranks: Ranks) -> Run:
    """Builds a run, from its newest undamaged checkpoint if there is one and ``settings.resume``.

    Raises as `pretrain.pretrain` does.
    """
    lock: RunLock | None = None
    if ranks.first:
        check_places(settings.out)
    try:
        lock = RunLock(settings.out) if ranks.first else None
        return _set_up(settings, resume_command, ranks, lock)
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{error.strerror}; solve the problem, then start with: {resume_command}"
            raise OSError(error.errno, reason, error.filename) from error
        raise


def _set_up(settings: PretrainSettings, resume_command: str, ranks: Ranks, lock: RunLock | None) -> Run:
    clock = Clock(ranks)
    found = ranks.from_first(lambda: find_checkpoint(settings.out / "checkpoints", settings))
    if found is not None:
        settings = keep_batch_sizes(settings, found[1], ranks)
    plan = resolve(settings, ranks)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    corpus = Corpus.open(settings.data)
    if settings.verify and ranks.local_rank == 0:  # once a machine: each may have a copy of its own
        corpus.verify(show_progress=ranks.first)
    inputs = RunInputs(corpus)
    saved = found[1].identity["--model"] if found is not None and (settings.init_from or settings.config) else None
    model = make_model(settings, plan, corpus, saved)
    model.encoder.checkpoint_activations = settings.checkpoint_activations
    model.z_loss = settings.z_loss
    set_float32_products(plan.precision)
    if plan.precision == "fp8":
        use_fp8(model)
    pairs: dict[str, Any] = {"nsp": settings.nsp, "sop": settings.sop}
    kind: dict[str, Any] = {**pairs, "mlm_probability": settings.mlm_probability}
    phases: list[PhaseData] = []
    for number, (seqlen, end) in enumerate(parse_phases(settings.seqlen)):
        size = (corpus.split("train"), plan.tokens_per_batch, seqlen)
        shape = fit_shape(*size, **kind)
        maker = BatchMaker(corpus, "train", shape, **kind, whole_word=settings.whole_word)
        examples = PackedExamples(maker, seed=settings.seed + number)
        # However the training masks, losses on held-out text are comparable.
        at_default = shape if settings.mlm_probability == MLM_PROBABILITY else fit_shape(*size, **pairs)
        maker = BatchMaker(corpus, "heldout", at_default, **pairs)
        heldout = heldout_batches(maker, tokens=HELDOUT_TOKENS[plan.device.type])
        phases.append(PhaseData(seqlen, end, shape, examples, heldout))
    called = distribute(model, plan.device, ranks, settings.parallel)
    optimizer = make_optimizer(
        model,
        plan.lr,
        settings.weight_decay,
        settings.optimizer,
        muon_scale=settings.muon_scale,
        muon_dtype=plan.compute_dtype,
        cautious_decay=settings.cautious_decay,
    )
    step = TrainingStep(
        called,
        optimizer,
        clip=settings.clip,
        compute_dtype=plan.compute_dtype,
        graph=settings.graph and plan.device.type == "cuda" and ranks.alone,
        compiled=settings.compile,
    )

    identity = run_identity(settings, plan, corpus, model.config, [phase.shape for phase in phases])
    first_weights = None
    if settings.init_from is not None and (settings.init_from / WEIGHTS_FILE).is_file():
        first_weights = file_sha256(settings.init_from / WEIGHTS_FILE)
    if settings.reproduce is not None:
        check_repetition(settings.reproduce, identity, first_weights)
    state = TrainerState(identity=identity, lanes=min(count_lanes(plan, phase.examples) for phase in phases))
    length = {"steps": settings.steps, "minutes": settings.minutes}
    complete = False
    changes: list[str] = []
    if found is not None:
        path, state = found
        check_identity(state.identity, identity, settings.out)
        load_checkpoint(path, model, optimizer, ranks)
        if step.scaler is not None and state.loss_scale is not None:
            step.scaler.load_state_dict(state.loss_scale)
        complete = state.finished and state.length == length
    state.length = length
    state.finished = False
    clock.before = state.elapsed_s

    (rate,) = ranks.sum([matmul_rate(plan.device, plan.compute_dtype)])
    matmul = matmul_words(plan.device, plan.compute_dtype)
    log: RunLog | None = None
    if ranks.first:
        corpus.tokenizer_path = inputs.keep(settings.out)
        if found is not None:
            changes = describe_changes(state, chosen_settings(settings, plan))
        if not complete:
            write_manifest(
                settings.out,
                resume_command.removesuffix(" --resume"),
                chosen_settings(settings, plan),
                state.step,
                ranks=ranks.world_size,
                threads=torch.get_num_threads(),
                identity=identity,
                init_from_sha256=first_weights,
                device=str(plan.device),
            )
            log = RunLog(settings.out, resume_step=state.step if found else None, tensorboard=settings.tensorboard)
    run = Run(
        ranks=ranks,
        resume_command=resume_command,
        settings=settings,
        plan=plan,
        corpus=corpus,
        phases=phases,
        model=model,
        optimizer=optimizer,
        average=None if settings.ema is None else WeightAverage(optimizer, settings.ema),
        step=step,
        state=state,
        clock=clock,
        schedule=Schedule(settings, state, clock, complete),
        matmul_rate=rate,
        matmul=matmul if ranks.alone else f"{matmul} in each of {ranks.world_size} processes",
        inputs=inputs,
        lock=lock,
        log=log,
    )
    _introduce(run)
    for sentence in changes:
        run.say(f"continuing: {sentence}")
    clock.read()
    return run


def chosen_settings(settings: PretrainSettings, plan: Plan) -> PretrainSettings:
    """``settings`` with the values of ``plan`` in place of what they leave open."""
    return dataclasses.replace(
        settings,
        model=settings.model if settings.init_from or settings.config else plan.model,
        device=plan.device.type,
        precision=plan.precision,
        tokens_per_batch=plan.tokens_per_batch,
        batch_tokens=plan.batch_tokens,
        lr=plan.lr,
        workers=plan.workers,
        log_every=plan.log_every,
        threads=torch.get_num_threads() if plan.device.type == "cpu" else settings.threads,
    )


def count_lanes(plan: Plan, examples: PackedExamples) -> int:
    """The largest divisor, up to `MAX_LANES`, of a step's micro-batches: it suits every number of ranks that divides
    them."""
    most = min(MAX_LANES, examples.chunks_per_epoch)
    return max(lanes for lanes in range(1, most + 1) if plan.common_micro_batches % lanes == 0)


def _introduce(run: Run) -> None:
    """Logs and prints what is trained, on what, for how long."""
    settings, plan, state, ranks = run.settings, run.plan, run.state, run.ranks
    chosen = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(plan).items()}
    given = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
    run.record(
        "run",
        settings=given,
        plan=chosen,
        ranks=ranks.world_size,
        shape=dataclasses.asdict(run.phase.shape),
        parameters=run.model.num_parameters(),
        unigram_entropy=run.corpus.unigram_entropy,
        matmul_rate=run.matmul_rate,
        torch=torch.__version__,
        device=run.device_words,
    )
    if settings.steps is not None:
        begins = [0.0, *(phase.end for phase in plan.step_sizes)]
        a_step = sum(size * (end - begin) for (size, end), begin in zip(plan.step_sizes, begins, strict=False))
        batches = settings.steps * a_step
        length = f"{settings.steps:,} steps ({batches / run.phases[0].examples.batches_per_epoch:.3g} epochs)"
    else:
        length = f"{settings.minutes:g} minutes"
    each = in_words(tuple(Phase(size // ranks.world_size, end) for size, end in plan.step_sizes))
    each = each if ranks.alone else f"{ranks.world_size} × {each}"
    run.say(
        f"{name_of_model(settings, plan)}: {run.model.num_parameters() / 1e6:.1f} M parameters, vocabulary "
        f"{run.corpus.vocab_size:,}, on {run.device_words} in {plan.precision}; "
        f"a {run.matmul} reaches {rate_words(run.matmul_rate)} here\n"
        f"{run.corpus.split('train').num_tokens:,} training tokens; {length} of {each} × "
        f"{plan.tokens_per_batch:,} tokens, segments up to {in_words(parse_phases(settings.seqlen))}, peak learning "
        f"rate {plan.lr:g}" + (f"; continuing after step {state.step:,}" if state.step else "")
    )
