"""The pretraining run: batches → steps → log, held-out evaluation, checkpoints → Hugging Face export and report.

A run is ``steps`` long or ``minutes`` long. Its progress, 0 … 1, drives the learning rate; with minutes it is the
share of the time that is spent, evaluation and export included, so the rate reaches 0 as the time runs out.
Interrupted (SIGINT, SIGTERM) it finishes the step, saves and says how to go on. On a CPU a continued run computes,
bit for bit, what an uninterrupted one would have (given steps; given minutes, the clock has its say).
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
from typing import Any

import torch
from tqdm import tqdm

from ..model.config import BertConfig
from ..model.fp8 import use_fp8
from ..model.hf import from_hf, save_hf
from ..model.packing import PackedBatch
from ..model.pretraining import BertForPreTraining
from .checkpoint import (
    CheckpointError,
    TrainerState,
    list_checkpoints,
    load_checkpoint,
    read_state,
    restore_generators,
    save_checkpoint,
)
from .corpus import Corpus
from .errors import UserError
from .evaluate import Evaluation, evaluate
from .flops import batch_flops, matmul_rate, rate_words
from .loader import batches, heldout_batches
from .log import RunLog, read_log
from .optim import learning_rate, make_optimizer
from .packing import BatchShape, PackedExamples
from .precision import set_float32_products
from .readback import Leash, Readback, Stopwatch
from .report import Report, guess_masked_words, plot_loss_curve
from .settings import Plan, PretrainSettings, resolve
from .step import StepResult, TrainingStep

EVALUATIONS = 10  # in a run, unless eval_every says otherwise
SAVE_SECONDS = 600.0  # between checkpoints, unless save_every says otherwise
FINISH_SECONDS = 5.0  # of the minutes, for the last checkpoint, the export, the plot and the report
HELDOUT_TOKENS = {"cpu": 65_536, "cuda": 1_048_576}  # evaluated on, at most


class Interrupted(Exception):
    """The run was told to stop, and has saved what there was. The message says how to go on."""


def pretrain(settings: PretrainSettings, resume_command: str) -> Report:
    """Runs ``fusebert pretrain``: trains, and leaves checkpoints/, hf/, log.jsonl, loss.png and report.md in ``out``.

    Args:
        resume_command: what to type to continue the run, for the messages that say so.

    Raises:
        UserError: an option, a checkpoint or the course of the training does not allow it.
        CorpusError: ``settings.data`` is no sound corpus.
        OSError: no space left, for instance. Earlier checkpoints are intact.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    with StopSignal() as stop:
        try:
            run = Run(settings, resume_command, stop)
            try:
                run.train()
                return run.finish()
            finally:
                run.log.close()
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is full: lower --tokens-per-batch, and give --batch-tokens to keep the size of a step"
            ) from error


class StopSignal:
    """Notes SIGINT and SIGTERM within the block; the second one has its ordinary effect, at once.

    Attributes:
        received: a signal came.
        armed: there is something to save. Before that, a signal raises `Interrupted` where it falls.
    """

    def __init__(self) -> None:
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
        os.write(2, b"\nfinishing the step, then saving; once more to stop at once\n")


class Interval:
    """Sums over the steps of a log line, kept on the device until it is closed, then on their way to the host."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Stopwatch(device)
        self.steps = self.tokens = self.flops = self.num_masked = self.num_pairs = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.grad_norms = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, config: BertConfig, window: Sequence[PackedBatch], result: StepResult) -> None:
        """Counts a step on the micro-batches of ``window``, which are on the CPU. Waits for nothing."""
        self.steps += 1
        self.tokens += sum(batch.num_tokens for batch in window)
        self.flops += sum(batch_flops(config, batch) for batch in window)
        self.num_masked += sum(batch.num_masked for batch in window)
        self.num_pairs += sum(batch.num_pairs for batch in window)
        self.sums += result.sums
        self.grad_norms += result.grad_norm

    def close(self, state: TrainerState, lr: float) -> None:
        """Stops the clock and sends for the sums, after the step that ``state`` and ``lr`` are of."""
        self.clock.stop()
        self.last_step, self.tokens_seen, self.lr = state.step, state.tokens, lr
        self.readback = Readback(torch.cat([self.sums, self.grad_norms[None]]))

    def read(self, matmul_rate: float) -> dict[str, Any]:
        """The means over the steps, as fields of a log record. Waits for the device where it is not there yet."""
        mlm_loss, nsp_loss, mlm_correct, nsp_correct, grad_norms = self.readback.values()
        grad_norm = grad_norms / self.steps
        seconds = self.clock.seconds()
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

    Raises as `pretrain` does.
    """

    def __init__(self, settings: PretrainSettings, resume_command: str, stop: StopSignal) -> None:
        self.started = time.perf_counter()
        self.settings = settings
        self.plan = plan = resolve(settings)
        self.resume_command = resume_command
        self.stop = stop
        self.checkpoints = settings.out / "checkpoints"
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)

        self.corpus = Corpus.open(settings.data)
        found = self._find_checkpoint()
        self.model = _make_model(settings, plan, self.corpus).to(plan.device)
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
        self.optimizer = make_optimizer(self.model, plan.lr, settings.weight_decay, settings.optimizer)
        self.step = TrainingStep(
            self.model,
            self.optimizer,
            clip=settings.clip,
            compute_dtype=plan.compute_dtype,
            graph=settings.graph and plan.device.type == "cuda",
            compiled=settings.compile,
        )

        self.state = TrainerState(identity=_identity(settings, plan, self.corpus, self.model.config, self.shape))
        length = {"steps": settings.steps, "minutes": settings.minutes}
        self.complete = False
        self.resumed_from: Path | None = None
        if found is not None:
            self.resumed_from, state = found
            _check_identity(state.identity, self.state.identity, settings.out)
            load_checkpoint(self.resumed_from, self.model, self.optimizer)
            if self.step.scaler is not None and state.loss_scale is not None:
                self.step.scaler.load_state_dict(state.loss_scale)
            self.complete = state.finished and state.length == length
            self.state = state
        self.state.length = length
        self.state.finished = False
        self.elapsed_before = self.state.elapsed_s

        self.matmul_rate, self.matmul = matmul_rate(plan.device, plan.compute_dtype)
        self.evaluation_s = 0.0
        self.step_s = 0.0
        settings.out.mkdir(parents=True, exist_ok=True)
        resume_step = self.state.step if found else None
        self.log = RunLog(settings.out, resume_step=resume_step, tensorboard=settings.tensorboard)
        self._introduce()

    # How far the run is.

    def elapsed(self) -> float:
        """Wall-clock seconds of the run, earlier sessions included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def _usable_seconds(self) -> float:
        assert self.settings.minutes is not None
        return 60.0 * self.settings.minutes - FINISH_SECONDS - 1.2 * self.evaluation_s

    def progress(self) -> float:
        """The share of the run that is done in the middle of the next step."""
        if self.settings.steps is not None:
            return (self.state.step + 0.5) / self.settings.steps
        return (self.elapsed() + 0.5 * self.step_s) / max(self._usable_seconds(), 1e-9)

    def done(self) -> bool:
        """Whether there is no step left, or no time for one."""
        if self.complete:
            return True
        if self.settings.steps is not None:
            return self.state.step >= self.settings.steps
        return self.state.step > 0 and self.elapsed() + self.step_s > self._usable_seconds()

    # What it does.

    def train(self) -> None:
        """Steps until the run is done."""
        settings, plan, state = self.settings, self.plan, self.state
        if state.first_evaluation is None:
            state.first_evaluation = dataclasses.asdict(self.evaluate())
        source = batches(
            self.examples, num_workers=plan.workers, start=state.batches, pin_memory=plan.device.type == "cuda"
        )
        if self.resumed_from is not None:
            restore_generators(self.resumed_from)
        self.model.train()
        self.stop.armed = True
        interval = Interval(plan.device)
        closed: list[Interval] = []  # whose figures are on their way
        leash = Leash(plan.device)
        evaluate_at = self._next_evaluation()
        saved_at = time.perf_counter()
        with tqdm(total=settings.steps, initial=state.step, unit="step", dynamic_ncols=True, disable=None) as bar:
            done = self.done()
            while not done:
                window = [next(source) for _ in range(plan.accumulation)]
                lr = learning_rate(plan.lr, self.progress(), settings.warmup)
                interval.add(self.model.config, window, self.step(window, lr))
                leash.step()
                state.step += 1
                state.batches += len(window)
                state.tokens += sum(batch.num_tokens for batch in window)
                bar.update()

                done = self.done()
                if settings.eval_every is not None:
                    evaluation_due = state.step % settings.eval_every == 0
                else:
                    evaluation_due = self.progress() >= evaluate_at
                if settings.save_every is not None:
                    save_due = state.step % settings.save_every == 0
                else:
                    save_due = time.perf_counter() - saved_at >= SAVE_SECONDS
                pause = done or evaluation_due or save_due or self.stop.received
                if state.step % plan.log_every == 0 or pause:
                    interval.close(state, lr)
                    closed.append(interval)
                    interval = Interval(plan.device)
                while closed and (pause or closed[0].readback.ready()):
                    self._log_interval(closed.pop(0), bar)
                if pause:
                    # At the end, finish() does both.
                    if evaluation_due and not done:
                        self.evaluate()
                        evaluate_at = self._next_evaluation()
                    if (save_due or self.stop.received) and not done:
                        path = self.save()
                        saved_at = time.perf_counter()
                        if self.stop.received:
                            raise Interrupted(
                                f"stopped after step {state.step}, saved in {path}; go on with:\n{self.resume_command}"
                            )
                    interval = Interval(plan.device)

    def evaluate(self) -> Evaluation:
        """Held-out figures of the model as it is, logged and printed."""
        started = time.perf_counter()
        result = evaluate(self.model, self.heldout, self.plan.compute_dtype)
        self.evaluation_s = time.perf_counter() - started
        fields = {**dataclasses.asdict(result), "perplexity": result.perplexity}
        self.log.write("eval", self.state.step, elapsed_s=self.elapsed(), seconds=self.evaluation_s, **fields)
        nsp = f", NSP accuracy {result.nsp_accuracy:.1%}" if result.nsp_accuracy is not None else ""
        tqdm.write(
            f"step {self.state.step:>6,}: held-out MLM loss {result.mlm_loss:.3f} (unigram entropy "
            f"{self.corpus.unigram_entropy:.3f}), accuracy {result.mlm_accuracy:.1%}{nsp}"
        )
        return result

    def save(self) -> Path:
        """Writes a checkpoint."""
        self.state.elapsed_s = self.elapsed()
        self.state.loss_scale = self.step.scaler.state_dict() if self.step.scaler is not None else None
        try:
            return save_checkpoint(self.checkpoints, self.model, self.optimizer, self.state)
        except OSError as error:
            raise OSError(
                error.errno,
                f"could not save step {self.state.step} ({error.strerror}); {self._last_checkpoint()}; when that is "
                f"mended, go on with: {self.resume_command}",
            ) from error

    def finish(self) -> Report:
        """Evaluates, saves, exports to hf/, draws loss.png and writes the report."""
        settings, state, out = self.settings, self.state, self.settings.out
        after = self.evaluate()
        state.finished = True
        if not self.complete:
            self.save()
        save_hf(self.model, out / "hf", self.corpus.tokenizer_path)
        try:
            plot_loss_curve(read_log(self.log.path), self.corpus.unigram_entropy, out / "loss.png")
            loss_curve = str(out / "loss.png")
        except ModuleNotFoundError as error:
            loss_curve = f"not drawn: {error}"
        assert state.first_evaluation is not None
        report = Report(
            model=str(settings.init_from or self.plan.model),
            parameters=self.model.num_parameters(),
            device=_device_words(self.plan.device),
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
            guesses=guess_masked_words(self.model, self.corpus, settings.seqlen),
            hf_directory=str(out / "hf"),
            loss_curve=loss_curve,
        )
        report.write(out)
        return report

    def _introduce(self) -> None:
        settings, plan, state = self.settings, self.plan, self.state
        chosen = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(plan).items()}
        given = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
        self.log.write(
            "run",
            state.step,
            settings=given,
            plan=chosen,
            shape=dataclasses.asdict(self.shape),
            parameters=self.model.num_parameters(),
            unigram_entropy=self.corpus.unigram_entropy,
            matmul_rate=self.matmul_rate,
            torch=torch.__version__,
            device=_device_words(plan.device),
        )
        length = f"{settings.steps:,} steps" if settings.steps is not None else f"{settings.minutes:g} minutes"
        tqdm.write(
            f"{settings.init_from or plan.model}: {self.model.num_parameters() / 1e6:.1f} M parameters, vocabulary "
            f"{self.corpus.vocab_size:,}, on {_device_words(plan.device)} in {plan.precision}; "
            f"a {self.matmul} reaches {rate_words(self.matmul_rate)} here\n"
            f"{self.corpus.split('train').num_tokens:,} training tokens; {length} of {plan.accumulation} × "
            f"{plan.tokens_per_batch:,} tokens, segments up to {settings.seqlen}, peak learning rate {plan.lr:g}"
            + (f"; going on after step {state.step:,}" if state.step else "")
        )

    def _log_interval(self, interval: Interval, bar: Any) -> None:
        """Reads a closed interval, stops the run if it is not finite, writes a log line, updates the bar."""
        state = self.state
        fields = interval.read(self.matmul_rate)
        if not math.isfinite(fields["mlm_loss"] + (fields["nsp_loss"] or 0.0) + fields["grad_norm"]):
            raise UserError(
                f"the loss or its gradient is not finite any more (steps {interval.last_step - interval.steps + 1} "
                f"to {interval.last_step}): lower --lr or raise --warmup; {self._last_checkpoint()}"
            )
        state.train_s += fields["seconds"]
        state.flops += interval.flops
        self.step_s = fields["seconds"] / interval.steps
        memory = _memory_bytes(self.plan.device)
        self.log.write(
            "train",
            interval.last_step,
            elapsed_s=self.elapsed(),
            tokens=interval.tokens_seen,
            lr=interval.lr,
            memory_bytes=memory,
            **fields,
        )
        if self.settings.minutes is not None:
            left = max(0.0, self._usable_seconds() - self.elapsed())
            bar.total = state.step + round(left / self.step_s)
        nsp = f" NSP {fields['nsp_loss']:.3f}" if fields["nsp_loss"] is not None else ""
        bar.set_postfix_str(
            f"MLM {fields['mlm_loss']:.3f}{nsp}, {fields['tokens_per_second']:,.0f} tokens/s, MFU {fields['mfu']:.0%}, "
            f"lr {interval.lr:.1e}, |g| {fields['grad_norm']:.2f}, {memory / 2**30:.1f} GiB"
        )

    def _next_evaluation(self) -> float:
        return (math.floor(self.progress() * EVALUATIONS) + 1) / EVALUATIONS

    def _find_checkpoint(self) -> tuple[Path, TrainerState] | None:
        """The newest checkpoint that is sound; None where there is no run yet."""
        found = list_checkpoints(self.checkpoints)
        if not found:
            return None
        if not self.settings.resume:
            raise UserError(
                f"{self.settings.out} already holds a run ({found[0].name}): give --resume to go on with it, or "
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
        "--batch-tokens": plan.accumulation * plan.tokens_per_batch,
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
