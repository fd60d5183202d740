"""The pretraining run: batches → steps → log, held-out evaluation, checkpoints → Hugging Face export and report.

A run is ``steps`` long or ``minutes`` long. Its progress, 0 … 1, drives the learning rate; with minutes it is the
share of the time that is spent, evaluation and export included, so the rate reaches 0 as the time runs out.
Interrupted (SIGINT, SIGTERM) it finishes the step, saves and says how to go on. On a CPU a continued run computes,
bit for bit, what an uninterrupted one would have (given steps; given minutes, the clock has its say).

Launched by torchrun, the processes share each step's micro-batches: which ones there are, in what order, and the
dropout of each depend on the settings alone, not on who computes them. The first process keeps the clock, writes and
prints; whatever decides how the run goes on is agreed upon once a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ...model.batch import PackedBatch
from ...model.config import BertConfig
from ...model.fp8 import use_fp8
from ...model.hf import from_hf, save_hf
from ...model.pretraining import BertForPreTraining
from ..batches.loader import batches, heldout_batches
from ..batches.pack import BatchShape, PackedExamples
from ..corpus.reader import Corpus
from ..errors import UserError
from ..step.distributed import LostPeer, Ranks, lost_connection
from ..step.flops import batch_flops, matmul_rate, matmul_words, rate_words
from ..step.optim import learning_rate, make_optimizer
from ..step.precision import set_float32_products
from ..step.sharding import distribute, replica
from ..step.step import StepResult, TrainingStep
from ..step.stopwatch import Stopwatch
from .checkpoint import (
    CheckpointError,
    TrainerState,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from .evaluate import Evaluation, evaluate
from .log import RunLog, read_log
from .plan import Plan, choose_device, resolve
from .readback import Leash, Readback
from .report import Report, guess_masked_words, plot_loss_curve
from .settings import PretrainSettings

EVALUATIONS = 10  # in a run, unless eval_every says otherwise
SAVE_SECONDS = 600.0  # between checkpoints, unless save_every says otherwise
FINISH_SECONDS = 5.0  # of the minutes, for the last checkpoint, the export, the plot and the report
LANES = 16  # at most: each is a chunk in memory, and with more ranks than lanes some of them make the same chunks
HELDOUT_TOKENS = {"cpu": 65_536, "cuda": 1_048_576}  # evaluated on, at most


class Interrupted(Exception):
    """The run was told to stop, and has saved what there was. The message says how to go on."""


def pretrain(settings: PretrainSettings, resume_command: str) -> Report | None:
    """Runs ``fusebert pretrain``: trains, and leaves checkpoints/, hf/, log.jsonl, loss.png and report.md in ``out``.

    Args:
        resume_command: what to type to continue the run, for the messages that say so.

    Returns:
        The report; None in a process of a torchrun job that is not the first.

    Raises:
        UserError: an option, a checkpoint or the course of the training does not allow it, or another process of the
            job ended.
        CorpusError: ``settings.data`` is no sound corpus.
        OSError: no space left, for instance. Earlier checkpoints are intact.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    ranks = Ranks.of_environment()
    with StopSignal(silent=not ranks.alone) as stop:
        try:
            ranks.join(choose_device(settings.device, ranks))
            run = Run(settings, resume_command, stop, ranks)
            try:
                run.train()
                report = run.finish()
            finally:
                run.close()
            ranks.leave()
            return report
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is full: lower --tokens-per-batch, and give --batch-tokens to keep the size of a step"
            ) from error
        except Exception as error:
            if lost_connection(error):
                raise LostPeer from error
            raise


class StopSignal:
    """Notes SIGINT and SIGTERM within the block; the second one has its ordinary effect, at once.

    Args:
        silent: do not tell the user, which a process among several can't: the others have yet to agree.

    Attributes:
        received: a signal came.
        armed: there is something to save. Before that, a signal raises `Interrupted` where it falls.
    """

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.received = False
        self.armed = False
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != self._pid:  # a worker, forked with this handler
            os.kill(os.getpid(), number)
        if not self.armed:
            raise Interrupted("stopped before the first step: there is nothing to save")
        self.received = True
        # Not print: the signal may have come in the middle of one.
        if not self.silent:
            os.write(2, b"\nfinishing the step, then saving; once more to stop at once\n")


class Counts(NamedTuple):
    """What there is in the micro-batches of a step: real tokens, FLOPs, masked tokens, labelled pairs."""

    tokens: int
    flops: int
    num_masked: int
    num_pairs: int

    @classmethod
    def of(cls, config: BertConfig, window: Sequence[PackedBatch]) -> Counts:
        """Those of ``window``, which is on the CPU."""
        return cls(
            sum(batch.num_tokens for batch in window),
            sum(batch_flops(config, batch) for batch in window),
            sum(batch.num_masked for batch in window),
            sum(batch.num_pairs for batch in window),
        )


class Interval:
    """Sums over the steps of a log line, kept on the device until it is closed, then on their way to the host."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Stopwatch(device)
        self.steps = self.tokens = self.flops = self.num_masked = self.num_pairs = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.grad_norms = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, counts: Counts, result: StepResult) -> None:
        """Counts a step whose micro-batches, those of all ranks, hold ``counts``. Waits for nothing."""
        self.steps += 1
        self.tokens += counts.tokens
        self.flops += counts.flops
        self.num_masked += counts.num_masked
        self.num_pairs += counts.num_pairs
        self.sums += result.sums
        self.grad_norms += result.grad_norm

    def close(self, state: TrainerState, lr: float) -> None:
        """Stops the clock and sends for the sums, after the step that ``state`` and ``lr`` are of."""
        self.clock.stop()
        self.last_step, self.tokens_seen, self.lr = state.step, state.tokens, lr
        self.readback = Readback(torch.cat([self.sums, self.grad_norms[None]]))

    def read(self, matmul_rate: float, ranks: Ranks) -> dict[str, Any]:
        """The means over the steps and all ranks, as fields of a log record. Waits for the device where it must."""
        *sums, grad_norms = self.readback.values()
        grad_norm = grad_norms / self.steps
        seconds = self.clock.seconds() if ranks.first else 0.0
        mlm_loss, nsp_loss, mlm_correct, nsp_correct, seconds = ranks.sum([*sums, seconds])
        masked, pairs = max(1, self.num_masked), self.num_pairs
        return {
            "mlm_loss": mlm_loss / masked,
            "mlm_accuracy": mlm_correct / masked,
            "nsp_loss": nsp_loss / pairs if pairs else None,
            "nsp_accuracy": nsp_correct / pairs if pairs else None,
            "grad_norm": grad_norm,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / matmul_rate,
            "seconds": seconds,
        }


class Run:
    """A run set up from its settings (and, resuming, from its newest sound checkpoint), ready to `train`.

    Attributes:
        now: seconds of the run so far, the same in all ranks; what is decided by the clock is decided by this one.
        stopping: one of the ranks was told to stop.

    Raises as `pretrain` does.
    """

    def __init__(self, settings: PretrainSettings, resume_command: str, stop: StopSignal, ranks: Ranks) -> None:
        self.started = time.perf_counter()
        self.ranks = ranks
        self.resume_command = resume_command
        self.stop = stop
        self.checkpoints = settings.out / "checkpoints"
        found = ranks.from_first(lambda: self._find_checkpoint(settings))
        if found is not None:
            settings = _same_steps(settings, found[1], ranks)
        self.settings = settings
        self.plan = plan = resolve(settings, ranks)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)

        self.corpus = Corpus.open(settings.data)
        self.model = _make_model(settings, plan, self.corpus)
        self.model.encoder.checkpoint_activations = settings.checkpoint_activations
        set_float32_products(plan.precision)
        if plan.precision == "fp8":
            use_fp8(self.model)
        kind: dict[str, Any] = {"nsp": settings.nsp, "mlm_probability": settings.mlm_probability}
        train = self.corpus.split("train")
        self.shape = BatchShape.fit(train, plan.tokens_per_batch, settings.seqlen, **kind)
        kind["whole_word"] = settings.whole_word
        self.examples = PackedExamples(self.corpus, "train", self.shape, seed=settings.seed, **kind)
        self.heldout = heldout_batches(self.corpus, self.shape, tokens=HELDOUT_TOKENS[plan.device.type], **kind)
        called = distribute(self.model, plan.device, ranks, settings.parallel)
        self.optimizer = make_optimizer(self.model, plan.lr, settings.weight_decay, settings.optimizer)
        self.step = TrainingStep(
            called,
            self.optimizer,
            clip=settings.clip,
            compute_dtype=plan.compute_dtype,
            graph=settings.graph and plan.device.type == "cuda" and ranks.alone,
            compiled=settings.compile,
        )

        self.state = TrainerState(
            identity=_identity(settings, plan, self.corpus, self.model.config, self.shape),
            lanes=_lanes(plan, self.examples),
        )
        length = {"steps": settings.steps, "minutes": settings.minutes}
        self.complete = False
        self.resumed_from: Path | None = None
        if found is not None:
            self.resumed_from, state = found
            _check_identity(state.identity, self.state.identity, settings.out)
            load_checkpoint(self.resumed_from, self.model, self.optimizer, ranks)
            if self.step.scaler is not None and state.loss_scale is not None:
                self.step.scaler.load_state_dict(state.loss_scale)
            self.complete = state.finished and state.length == length
            self.state = state
        self.state.length = length
        self.state.finished = False
        self.elapsed_before = self.state.elapsed_s

        (self.matmul_rate,) = ranks.sum([matmul_rate(plan.device, plan.compute_dtype)])
        self.matmul = matmul_words(plan.device, plan.compute_dtype)
        if not ranks.alone:
            self.matmul += f" in each of {ranks.world_size} processes"
        self.evaluation_s = 0.0
        self.step_s = 0.0
        self.now = 0.0
        self.stopping = False
        self.log: RunLog | None = None
        if ranks.first:
            settings.out.mkdir(parents=True, exist_ok=True)
            resume_step = self.state.step if found else None
            self.log = RunLog(settings.out, resume_step=resume_step, tensorboard=settings.tensorboard)
        self._introduce()
        self._read_clock()

    def close(self) -> None:
        """Closes the log."""
        if self.log is not None:
            self.log.close()

    # How far the run is.

    def elapsed(self) -> float:
        """Wall-clock seconds of the run, earlier sessions included, by this process's clock."""
        return self.elapsed_before + time.perf_counter() - self.started

    def _read_clock(self) -> None:
        (self.now,) = self.ranks.sum([self.elapsed() if self.ranks.first else 0.0])

    def _agree(self, window: Sequence[PackedBatch]) -> Counts:
        """What all ranks' windows hold together; sets the clock, and notes who was told to stop."""
        clock = self.elapsed() if self.ranks.first else 0.0
        mine = Counts.of(self.model.config, window)
        *counts, self.now, stops = self.ranks.sum([*mine, clock, float(self.stop.received)])
        self.stopping = stops > 0
        return Counts(*map(int, counts))

    def _usable_seconds(self) -> float:
        assert self.settings.minutes is not None
        return 60.0 * self.settings.minutes - FINISH_SECONDS - 1.2 * self.evaluation_s

    def progress(self) -> float:
        """The share of the run that is done in the middle of the next step."""
        if self.settings.steps is not None:
            return (self.state.step + 0.5) / self.settings.steps
        return (self.now + 0.5 * self.step_s) / max(self._usable_seconds(), 1e-9)

    def done(self) -> bool:
        """Whether there is no step left, or no time for one."""
        if self.complete:
            return True
        if self.settings.steps is not None:
            return self.state.step >= self.settings.steps
        return self.state.step > 0 and self.now + self.step_s > self._usable_seconds()

    # What it does.

    def train(self) -> None:
        """Steps until the run is done."""
        settings, plan, state = self.settings, self.plan, self.state
        if state.first_evaluation is None:
            state.first_evaluation = dataclasses.asdict(self.evaluate())
        ranks, micro_batches = self.ranks, plan.batch_tokens // plan.tokens_per_batch
        source = batches(
            self.examples,
            num_workers=plan.workers,
            start=state.batches,
            rank=ranks.rank,
            world_size=ranks.world_size,
            lanes=state.lanes,
            pin_memory=plan.device.type == "cuda",
        )
        self.model.train()
        self.stop.armed = True
        interval = Interval(plan.device)
        closed: list[Interval] = []  # whose figures are on their way
        leash = Leash(plan.device)
        evaluate_at = self._next_evaluation()
        saved_at = self.now
        with tqdm(
            total=settings.steps,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if ranks.first else True,
        ) as bar:
            done = self.done()
            window = [next(source) for _ in range(plan.accumulation)] if not done else []
            counts = self._agree(window)
            while not done:
                lr = learning_rate(plan.lr, self.progress(), settings.warmup)
                numbers = range(state.batches + ranks.rank, state.batches + micro_batches, ranks.world_size)
                seeds = [_dropout_seed(settings.seed, number) for number in numbers]
                result = self.step(window, lr, labels=(counts.num_masked, counts.num_pairs), seeds=seeds)
                interval.add(counts, result)
                leash.step()
                state.step += 1
                state.batches += micro_batches
                state.tokens += counts.tokens
                bar.update()

                # The next window, while the device is at work on this one.
                window = [next(source) for _ in range(plan.accumulation)]
                counts = self._agree(window)
                done = self.done()
                if settings.eval_every is not None:
                    evaluation_due = state.step % settings.eval_every == 0
                else:
                    evaluation_due = self.progress() >= evaluate_at
                if settings.save_every is not None:
                    save_due = state.step % settings.save_every == 0
                else:
                    save_due = self.now - saved_at >= SAVE_SECONDS
                pause = done or evaluation_due or save_due or self.stopping
                if state.step % plan.log_every == 0 or pause:
                    interval.close(state, lr)
                    closed.append(interval)
                    interval = Interval(plan.device)
                # Several ranks add up their sums, at the same step: none of them asks whether its own have come.
                while closed and (pause or not ranks.alone or closed[0].readback.ready()):
                    self._log_interval(closed.pop(0), bar)
                if pause:
                    # At the end, finish() does both.
                    if evaluation_due and not done:
                        self.evaluate()
                        evaluate_at = self._next_evaluation()
                    if (save_due or self.stopping) and not done:
                        path = self.save()
                        saved_at = self.now
                        if self.stopping:
                            raise Interrupted(
                                f"stopped after step {state.step}, saved in {path}; go on with:\n{self.resume_command}"
                            )
                    self._read_clock()
                    interval = Interval(plan.device)

    def evaluate(self) -> Evaluation:
        """Held-out figures of the model as it is, logged and printed."""
        self._read_clock()
        started = self.now
        result = evaluate(self.model, self.heldout, self.plan.compute_dtype, self.ranks)
        self._read_clock()
        self.evaluation_s = self.now - started
        fields = {**dataclasses.asdict(result), "perplexity": result.perplexity}
        self._record("eval", elapsed_s=self.now, seconds=self.evaluation_s, **fields)
        nsp = f", NSP accuracy {result.nsp_accuracy:.1%}" if result.nsp_accuracy is not None else ""
        self._say(
            f"step {self.state.step:>6,}: held-out MLM loss {result.mlm_loss:.3f} (unigram entropy "
            f"{self.corpus.unigram_entropy:.3f}), accuracy {result.mlm_accuracy:.1%}{nsp}"
        )
        return result

    def save(self) -> Path:
        """Writes a checkpoint."""
        self.state.elapsed_s = self.elapsed()
        self.state.loss_scale = self.step.scaler.state_dict() if self.step.scaler is not None else None
        try:
            path = save_checkpoint(self.checkpoints, self.model, self.optimizer, self.state, ranks=self.ranks)
        except OSError as error:
            raise OSError(
                error.errno,
                f"could not save step {self.state.step} ({error.strerror}); {self._last_checkpoint()}; when that is "
                f"mended, go on with: {self.resume_command}",
            ) from error
        self._read_clock()
        return path

    def finish(self) -> Report | None:
        """Evaluates, saves, exports to hf/, draws loss.png and writes the report, which the first process returns."""
        settings, state, out = self.settings, self.state, self.settings.out
        after = self.evaluate()
        state.finished = True
        if not self.complete:
            self.save()
        model = replica(self.model, self.ranks)
        if model is None or self.log is None:
            return None
        save_hf(model, out / "hf", self.corpus.tokenizer_path)
        try:
            plot_loss_curve(read_log(self.log.path), self.corpus.unigram_entropy, out / "loss.png")
            loss_curve = str(out / "loss.png")
        except ModuleNotFoundError as error:
            loss_curve = f"not drawn: {error}"
        assert state.first_evaluation is not None
        report = Report(
            model=str(settings.init_from or self.plan.model),
            parameters=self.model.num_parameters(),
            device=self._device_words(),
            precision=self.plan.precision,
            steps=state.step,
            tokens=state.tokens,
            seconds=state.elapsed_s if self.complete else self.elapsed(),
            tokens_per_second=state.tokens / max(state.train_s, 1e-9),
            mfu=state.flops / max(state.train_s, 1e-9) / self.matmul_rate,
            matmul_rate=self.matmul_rate,
            matmul=self.matmul,
            unigram_entropy=self.corpus.unigram_entropy,
            before=Evaluation(**state.first_evaluation),
            after=after,
            guesses=guess_masked_words(model, self.corpus, settings.seqlen),
            hf_directory=str(out / "hf"),
            loss_curve=loss_curve,
        )
        report.write(out)
        return report

    def _record(self, kind: str, *, step: int | None = None, **fields: Any) -> None:
        if self.log is not None:
            self.log.write(kind, self.state.step if step is None else step, **fields)

    def _say(self, text: str) -> None:
        if self.ranks.first:
            tqdm.write(text)

    def _device_words(self) -> str:
        words = _device_words(self.plan.device)
        return words if self.ranks.alone else f"{self.ranks.world_size} × {words}, {self.settings.parallel.upper()}"

    def _introduce(self) -> None:
        settings, plan, state = self.settings, self.plan, self.state
        chosen = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(plan).items()}
        given = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
        self._record(
            "run",
            settings=given,
            plan=chosen,
            ranks=self.ranks.world_size,
            shape=dataclasses.asdict(self.shape),
            parameters=self.model.num_parameters(),
            unigram_entropy=self.corpus.unigram_entropy,
            matmul_rate=self.matmul_rate,
            torch=torch.__version__,
            device=self._device_words(),
        )
        length = f"{settings.steps:,} steps" if settings.steps is not None else f"{settings.minutes:g} minutes"
        each = f"{plan.accumulation}" if self.ranks.alone else f"{self.ranks.world_size} × {plan.accumulation}"
        self._say(
            f"{settings.init_from or plan.model}: {self.model.num_parameters() / 1e6:.1f} M parameters, vocabulary "
            f"{self.corpus.vocab_size:,}, on {self._device_words()} in {plan.precision}; "
            f"a {self.matmul} reaches {rate_words(self.matmul_rate)} here\n"
            f"{self.corpus.split('train').num_tokens:,} training tokens; {length} of {each} × "
            f"{plan.tokens_per_batch:,} tokens, segments up to {settings.seqlen}, peak learning rate {plan.lr:g}"
            + (f"; going on after step {state.step:,}" if state.step else "")
        )

    def _log_interval(self, interval: Interval, bar: Any) -> None:
        """Reads a closed interval, stops the run if it is not finite, writes a log line, updates the bar."""
        state = self.state
        fields = interval.read(self.matmul_rate, self.ranks)
        if not math.isfinite(fields["mlm_loss"] + (fields["nsp_loss"] or 0.0) + fields["grad_norm"]):
            raise UserError(
                f"the loss or its gradient is not finite any more (steps {interval.last_step - interval.steps + 1} "
                f"to {interval.last_step}): lower --lr or raise --warmup; {self._last_checkpoint()}"
            )
        state.train_s += fields["seconds"]
        state.flops += interval.flops
        self.step_s = fields["seconds"] / interval.steps
        memory = _memory_bytes(self.plan.device)
        self._record(
            "train",
            step=interval.last_step,
            elapsed_s=self.elapsed(),
            tokens=interval.tokens_seen,
            lr=interval.lr,
            memory_bytes=memory,
            **fields,
        )
        if self.settings.minutes is not None:
            left = max(0.0, self._usable_seconds() - self.now)
            bar.total = state.step + round(left / self.step_s)
        nsp = f" NSP {fields['nsp_loss']:.3f}" if fields["nsp_loss"] is not None else ""
        bar.set_postfix_str(
            f"MLM {fields['mlm_loss']:.3f}{nsp}, {fields['tokens_per_second']:,.0f} tokens/s, MFU {fields['mfu']:.0%}, "
            f"lr {interval.lr:.1e}, |g| {fields['grad_norm']:.2f}, {memory / 2**30:.1f} GiB"
        )

    def _next_evaluation(self) -> float:
        return (math.floor(self.progress() * EVALUATIONS) + 1) / EVALUATIONS

    def _find_checkpoint(self, settings: PretrainSettings) -> tuple[Path, TrainerState] | None:
        """The newest checkpoint that is sound; None where there is no run yet."""
        found = list_checkpoints(self.checkpoints)
        if not found:
            return None
        if not settings.resume:
            raise UserError(
                f"{settings.out} already holds a run ({found[0].name}): give --resume to go on with it, or "
                "another --out"
            )
        for path in found:
            try:
                return path, read_state(path)
            except CheckpointError as error:
                print(f"fusebert: warning: {error}; trying the one before", file=sys.stderr)
        raise UserError(f"no checkpoint in {self.checkpoints} is sound: remove that folder, or give another --out")

    def _last_checkpoint(self) -> str:
        found = list_checkpoints(self.checkpoints)
        return f"the last checkpoint, {found[0]}, is intact" if found else "there was no checkpoint yet"


def _same_steps(settings: PretrainSettings, state: TrainerState, ranks: Ranks) -> PretrainSettings:
    """``settings`` with the sizes of the run that is continued, where they leave them open: the defaults follow the
    number of processes and their memory."""
    tokens, batch = state.identity["--tokens-per-batch"], state.identity["--batch-tokens"]
    if settings.batch_tokens in (None, batch) and batch // tokens % ranks.world_size:
        raise UserError(
            f"the run in {settings.out} takes {batch // tokens} micro-batches of {tokens} tokens a step: go on with a "
            f"number of processes that divides {batch // tokens}; there are {ranks.world_size}"
        )
    return dataclasses.replace(
        settings,
        tokens_per_batch=settings.tokens_per_batch or tokens,
        batch_tokens=settings.batch_tokens or batch,
    )


def _lanes(plan: Plan, examples: PackedExamples) -> int:
    """The most, up to `LANES`, that divide a step's micro-batches: then they suit any number of ranks that does."""
    micro_batches = plan.batch_tokens // plan.tokens_per_batch
    most = min(LANES, examples.chunks_per_epoch)
    return max(lanes for lanes in range(1, most + 1) if micro_batches % lanes == 0)


def _dropout_seed(seed: int, number: int) -> int:
    """Of the micro-batch ``number`` of a run, whichever process computes it."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def _make_model(settings: PretrainSettings, plan: Plan, corpus: Corpus) -> BertForPreTraining:
    """A new model from the preset, or the one in ``settings.init_from``, with the dropout asked for."""
    dropout: dict[str, Any] = {
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.dropout,
    }
    if settings.init_from is None:
        special = corpus.special
        model = BertForPreTraining(
            BertConfig.preset(plan.model, corpus.vocab_size, pad_token_id=special.pad, **dropout)
        )
    else:
        source = from_hf(settings.init_from)
        if source.config.vocab_size != corpus.vocab_size:
            raise UserError(
                f"--init-from {settings.init_from} has a vocabulary of {source.config.vocab_size} tokens, the corpus "
                f"{corpus.directory} one of {corpus.vocab_size}: prepare the corpus with that model's tokenizer "
                "(fusebert prepare --tokenizer)"
            )
        _check_vocabulary(settings.init_from, corpus)
        model = BertForPreTraining(dataclasses.replace(source.config, **dropout))
        model.load_state_dict(source.state_dict())
    if settings.seqlen > model.config.max_position_embeddings:
        raise UserError(
            f"--seqlen {settings.seqlen} is more than the model's {model.config.max_position_embeddings} positions"
        )
    return model


def _check_vocabulary(directory: Path, corpus: Corpus) -> None:
    """Raises UserError when the folder has a tokenizer.json with other tokens than the corpus's."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    theirs, ours = (Tokenizer.from_file(str(each)).get_vocab() for each in (path, corpus.tokenizer_path))
    if theirs != ours:
        raise UserError(
            f"--init-from {directory} has another vocabulary than the corpus {corpus.directory}, of the same size: "
            "prepare the corpus with that model's tokenizer (fusebert prepare --tokenizer)"
        )


def _identity(
    settings: PretrainSettings, plan: Plan, corpus: Corpus, config: BertConfig, shape: BatchShape
) -> dict[str, Any]:
    """What a continuation must share with the run: its model, corpus and batches. By option, for the messages."""
    model = {k: v for k, v in dataclasses.asdict(config).items() if not k.endswith("dropout_prob")}
    splits = json.dumps(corpus.manifest["splits"], sort_keys=True).encode()
    return {
        "--model": model,
        "--data (tokenizer)": corpus.manifest["tokenizer"]["sha256"],
        "--data": hashlib.sha256(splits).hexdigest(),
        "--seqlen": settings.seqlen,
        "--tokens-per-batch": plan.tokens_per_batch,
        "--batch-tokens": plan.batch_tokens,
        "--seed": settings.seed,
        "--optimizer": settings.optimizer,
        "--nsp": settings.nsp,
        "--whole-word": settings.whole_word,
        "--mlm-probability": settings.mlm_probability,
        "batch shape": dataclasses.asdict(shape),
    }


def _check_identity(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    for name, value in now.items():
        was = before.get(name)
        if was == value:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            parts = [key for key in value if was.get(key) != value[key]]
            detail = ", ".join(f"{key} {was.get(key)} there, {value[key]} here" for key in parts)
        else:
            detail = f"{was} there, {value} here"
        raise UserError(
            f"the run in {out} can't go on with another {name} ({detail}): give what it was started with, or "
            "another --out"
        )


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _memory_bytes(device: torch.device) -> int:
    """The most memory held so far: PyTorch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = ["Interrupted", "pretrain"]
