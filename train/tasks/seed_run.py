"""The training of one seed of ``fusebert finetune``: steps, evaluations, checkpoints, the best model.

The best model so far is in ``best-STEP``. A checkpoint names its step, and older ones are removed only after a
checkpoint names another, so at each moment the newest checkpoint and its best model are both there.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...model.atomic import replace_file
from ...model.text_batch import TextBatch
from ..errors import UserError
from ..run.checkpoint import TrainerState, clean_up, load_checkpoint, newest_good, save_checkpoint
from ..run.log import RunLog
from ..run.loop import dropout_seed
from ..run.signals import Stopped, StopSignal
from ..run.strict_json import strict_json
from ..step.optim import learning_rate, make_optimizer
from ..step.step import StepResult
from .models import Machine
from .say import say
from .scores import goodness
from .settings import FinetuneSettings

RESULT = "result.json"
LOG_EVERY = {"cpu": 10, "cuda": 50}  # steps; the host waits for the device at each log line
SAVE_SECONDS = 600.0  # between checkpoints within an epoch
MAX_SKIPS = 20  # steps in a row; fp16 may need 16 to lower its scale from 2^16 to 1


class Step(Protocol):
    """Trains a model: `TrainingStep`, or one that calls it."""

    @property
    def scaler(self) -> torch.amp.GradScaler | None: ...

    def __call__(self, window: Sequence[TextBatch], lr: float, *, seeds: Sequence[int]) -> StepResult: ...


class Batches(Protocol):
    """The micro-batches of each step, as `EpochBatches`."""

    steps: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[TextBatch]]: ...


class Job(Protocol):
    """What is trained, on what, and how it is scored: `job.Job`, or that of another task.

    Attributes:
        metric: of ``scores``; chooses the best model.
    """

    @property
    def settings(self) -> FinetuneSettings: ...
    @property
    def machine(self) -> Machine: ...
    @property
    def metric(self) -> str: ...

    def model(self, seed: int) -> tuple[Any, list[str]]:
        """The model before the first step, on its device, and what to tell the user about its weights."""

    def step(self, model: Any, optimizer: torch.optim.Optimizer) -> Step:
        """What trains ``model``."""

    def batches(self, seed: int) -> Batches:
        """The training texts."""

    def scores(self, model: Any) -> dict[str, float]:
        """The scores on the dev texts, "loss" among them. Sets what is chosen by these texts, such as a threshold."""

    def save(self, model: Any, folder: Path) -> None:
        """Writes ``model`` as a folder that others load."""


class Interval:
    """The steps of a log line: sums on the device."""

    def __init__(self, device: torch.device) -> None:
        self.steps = self.tokens = 0
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._started = time.perf_counter()

    def add(self, result: StepResult, labels: int, tokens: int) -> None:
        """Adds a step. Does not synchronise."""
        self.steps += 1
        self.tokens += tokens
        one = torch.ones_like(result.skipped)
        values = torch.stack([*result.sums, result.grad_norm.double(), one.double() * labels, one.double()])
        self._sums += torch.where(result.skipped > 0.0, 0.0, values)

    def read(self) -> dict[str, Any]:
        """Means over the steps that were not skipped, as fields of a log record. Waits for the device."""
        loss, correct, norm, labels, kept = self._sums.tolist()
        return {
            "loss": loss / labels if kept else None,
            "accuracy": correct / labels if kept else None,
            "grad_norm": norm / kept if kept else None,
            "skipped": self.steps - int(kept),
            "tokens_per_second": self.tokens / max(time.perf_counter() - self._started, 1e-9),
        }


def train_seed(job: Job, seed: int, stop: StopSignal) -> dict[str, Any]:
    """Trains with ``seed``, from where it was stopped, and returns the content of its result.json.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        UserError: loss or weights are not finite.
        OSError: for example no space left.
    """
    out = job.settings.out / f"seed-{seed}"
    if (out / RESULT).is_file():
        done: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
        return done
    run = SeedRun(job, seed, stop, out)
    try:
        return run.train()
    finally:
        run.log.close()


class SeedRun:
    """The state of a seed.

    Attributes:
        log: of the seed.
    """

    def __init__(self, job: Job, seed: int, stop: StopSignal, out: Path) -> None:
        settings = job.settings
        self._job, self._seed, self._stop, self._out = job, seed, stop, out
        self._model, notes = job.model(seed)
        for note in notes if seed == settings.seed else []:
            say(note)
        self._optimizer = make_optimizer(
            self._model, settings.lr, settings.weight_decay, layer_decay=settings.layer_decay
        )
        self._step = job.step(self._model, self._optimizer)
        self._batches = job.batches(seed)
        self._total = self._batches.steps * settings.epochs
        self._state = TrainerState(identity={"seed": seed})
        out.mkdir(parents=True, exist_ok=True)
        clean_up(out / "checkpoints")
        found = newest_good(out / "checkpoints")
        if found is not None:
            path, self._state = found
            load_checkpoint(path, self._model, self._optimizer)
            if self._step.scaler is not None and self._state.loss_scale is not None:
                self._step.scaler.load_state_dict(self._state.loss_scale)
        self._before = self._state.elapsed_s
        self._started = self._saved = time.perf_counter()
        self.log = RunLog(
            out, resume_step=self._state.step if found is not None else None, tensorboard=settings.tensorboard
        )
        self.log.write("run", self._state.step, seed=seed, notes=notes, parameters=_size(self._model))

    def train(self) -> dict[str, Any]:
        """See `train_seed`."""
        settings, state, steps = self._job.settings, self._state, self._batches.steps
        with tqdm(
            total=self._total,
            initial=state.step,
            unit="step",
            desc=f"seed {self._seed}",
            dynamic_ncols=True,
            disable=None,
        ) as bar:
            for epoch in range(state.step // steps, settings.epochs):
                if self._out_of_patience():
                    break
                self._train_epoch(epoch, bar)
                self._evaluate(epoch)
                self._save()
                if self._stop.received is not None and state.step < self._total:
                    raise Stopped(bool(self._stop.share()[0]))
        return self._finish()

    def _train_epoch(self, epoch: int, bar: tqdm) -> None:
        settings, state, device = self._job.settings, self._state, self._job.machine.device
        self._model.train()
        interval, skips = Interval(device), 0
        for window in self._batches.epoch(epoch, state.step % self._batches.steps):
            if device.type == "cuda":
                window = [batch.map(Tensor.pin_memory) for batch in window]
            lr = learning_rate(settings.lr, (state.step + 0.5) / self._total, settings.warmup)
            seeds = [dropout_seed(self._seed, state.batches + i) for i in range(len(window))]
            result = self._step(window, lr, seeds=seeds)
            tokens = sum(batch.num_tokens for batch in window)
            interval.add(result, sum(batch.num_labels for batch in window), tokens)
            state.step += 1
            state.batches += len(window)
            state.tokens += tokens
            bar.update()
            self._stop.armed = True
            if state.step % LOG_EVERY[device.type] == 0 or state.step % self._batches.steps == 0:
                fields = interval.read()
                self.log.write("finetune", state.step, epoch=epoch + 1, lr=lr, **fields)
                skips = skips + interval.steps if fields["skipped"] == interval.steps else 0
                state.skipped += fields["skipped"]
                if skips >= MAX_SKIPS:
                    raise UserError(
                        f"the loss or its gradient was not finite in {skips} steps in a row, up to step {state.step} "
                        f"of seed {self._seed}: lower --lr or raise --warmup"
                    )
                if fields["loss"] is not None:
                    bar.set_postfix_str(f"loss {fields['loss']:.3f}, {fields['tokens_per_second']:,.0f} tokens/s")
                interval = Interval(device)
            if state.step % self._batches.steps == 0:
                return
            if self._stop.received is not None:
                self._save()
                raise Stopped(bool(self._stop.share()[0]))
            if time.perf_counter() - self._saved > SAVE_SECONDS:
                self._save()

    def _evaluate(self, epoch: int) -> None:
        """Scores the model on the dev texts, and keeps it if it is the best so far."""
        job, state = self._job, self._state
        found = job.scores(self._model)
        if not math.isfinite(found["loss"]):
            raise UserError(
                f"the loss on --dev after step {state.step} of seed {self._seed} is not finite: lower --lr or raise "
                "--warmup"
            )
        before = goodness(job.metric, state.selection["scores"]) if state.selection is not None else None
        is_best = before is None or goodness(job.metric, found) > before
        self.log.write("dev", state.step, epoch=epoch + 1, is_best=is_best, **found)
        words = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        say(f"seed {self._seed}, epoch {epoch + 1}: {words}")
        if is_best:
            job.save(self._model, self._out / f"best-{state.step}")
            state.selection = {"step": state.step, "scores": found, "since": 0}
        elif state.selection is not None:
            state.selection = {**state.selection, "since": state.selection["since"] + 1}

    def _out_of_patience(self) -> bool:
        patience, selection = self._job.settings.patience, self._state.selection
        return patience is not None and selection is not None and selection["since"] >= patience

    def _save(self) -> None:
        state = self._state
        state.elapsed_s = self._before + time.perf_counter() - self._started
        state.loss_scale = self._step.scaler.state_dict() if self._step.scaler is not None else None
        save_checkpoint(self._out / "checkpoints", self._model, self._optimizer, state, keep=1)
        for path in self._out.glob("best-*"):
            if state.selection is None or path.name != f"best-{state.selection['step']}":
                shutil.rmtree(path)
        self._saved = time.perf_counter()

    def _finish(self) -> dict[str, Any]:
        state, out = self._state, self._out
        assert state.selection is not None
        best = out / f"best-{state.selection['step']}"
        if best.is_dir():  # else the process was killed after the renaming
            shutil.rmtree(out / "hf", ignore_errors=True)
            best.rename(out / "hf")
        result = {
            "seed": self._seed,
            "steps": state.step,
            "best_step": state.selection["step"],
            "best_epoch": state.selection["step"] / self._batches.steps,
            "skipped": state.skipped,
            "tokens": state.tokens,
            "seconds": state.elapsed_s,
            "scores": state.selection["scores"],
        }
        with replace_file(out / RESULT) as partial:
            partial.write_text(strict_json(result, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out / "checkpoints")
        return result


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
