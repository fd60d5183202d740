"""The training loop: batches, steps, log lines, evaluations, checkpoints.

The host prepares the next batches while the device computes, and reads losses without waiting for the device. With
several ranks, everything that decides how the run continues is agreed once a step: the clock of rank 0, the label
counts of the step, and whether any rank was told to stop.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ...model.batch import PackedBatch
from ..batches.loader import batches
from ..errors import UserError
from ..step.optim import learning_rate
from .checkpoint import list_checkpoints, save_checkpoint
from .evaluate import Evaluation, evaluate
from .metrics import Counts, Interval, peak_memory_bytes
from .setup import Run
from .signals import Interrupted, StopSignal


class RunAheadLimit:
    """Keeps the host at most ``steps`` steps ahead of the device.

    Enough that the device always has work queued, and few enough that a signal, the end of the time or a loss that is
    not finite takes effect soon.
    """

    def __init__(self, device: torch.device, steps: int = 8) -> None:
        self._steps = steps
        self._on_gpu = device.type == "cuda"
        self._events: collections.deque[torch.cuda.Event] = collections.deque()

    def step(self) -> None:
        """Call it after each step. Waits for the step that lies ``steps`` back."""
        if not self._on_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > self._steps:
            self._events.popleft().synchronize()


def train(run: Run, stop: StopSignal) -> None:
    """Trains until the run's end.

    Raises as `pretrain.pretrain` does.
    """
    settings, plan, state, ranks, schedule = run.settings, run.plan, run.state, run.ranks, run.schedule
    if state.first_evaluation is None:
        state.first_evaluation = evaluate_and_log(run).to_json()
    micro_batches = plan.batch_tokens // plan.tokens_per_batch
    source = batches(
        run.examples,
        num_workers=plan.workers,
        start=state.batches,
        rank=ranks.rank,
        world_size=ranks.world_size,
        lanes=state.lanes,
        pin_memory=plan.device.type == "cuda",
    )
    run.model.train()
    stop.armed = True
    limit = RunAheadLimit(plan.device)
    interval = Interval(plan.device)
    closed: list[Interval] = []  # copied to the host at the moment
    schedule.start()
    with tqdm(
        total=settings.steps,
        initial=state.step,
        unit="step",
        dynamic_ncols=True,
        disable=None if ranks.first else True,
    ) as bar:
        done = schedule.done()
        window = [] if done else _next_window(source, plan.accumulation)
        counts, stopping = _agree(run, window, stop)
        while not done:
            lr = learning_rate(plan.lr, schedule.progress(), settings.warmup)
            numbers = range(state.batches + ranks.rank, state.batches + micro_batches, ranks.world_size)
            seeds = [dropout_seed(settings.seed, number) for number in numbers]
            result = run.step(window, lr, labels=(counts.num_masked, counts.num_pairs), seeds=seeds)
            interval.add(counts, result)
            limit.step()
            state.step += 1
            state.batches += micro_batches
            state.tokens += counts.tokens
            bar.update()

            # Prepare the next window while the device computes this one.
            window = _next_window(source, plan.accumulation)
            counts, stopping = _agree(run, window, stop)
            done = schedule.done()
            evaluation_due, save_due = schedule.evaluation_due(), schedule.save_due()
            pause = done or evaluation_due or save_due or stopping
            if state.step % plan.log_every == 0 or pause:
                interval.close(state.step, state.tokens, lr)
                closed.append(interval)
                interval = Interval(plan.device)
            # Several ranks sum their intervals, so they must read them at the same step, ready or not.
            while closed and (pause or not ranks.alone or closed[0].ready()):
                _log_interval(run, closed.pop(0), bar)
            if pause:
                if evaluation_due and not done:  # at the end the caller evaluates and saves
                    evaluate_and_log(run)
                    schedule.evaluated()
                if (save_due or stopping) and not done:
                    path = save(run)
                    schedule.saved()
                    if stopping:
                        raise Interrupted(
                            f"stopped after step {state.step}, saved in {path}; go on with:\n{run.resume_command}"
                        )
                run.clock.read()
                interval = Interval(plan.device)


def _next_window(source: Iterator[PackedBatch], size: int) -> list[PackedBatch]:
    return [next(source) for _ in range(size)]


def _agree(run: Run, window: Sequence[PackedBatch], stop: StopSignal) -> tuple[Counts, bool]:
    """The counts of all ranks' windows, and whether any rank was told to stop. Reads the clock. A collective call."""
    own = Counts.of(run.model.config, window)
    *counts, run.clock.now, stops = run.ranks.sum([*own, run.clock.share(), float(stop.received)])
    return Counts(*map(int, counts)), stops > 0


def dropout_seed(seed: int, number: int) -> int:
    """Seed for the dropout of micro-batch ``number`` of a run, the same on every rank.

    Args:
        seed: of the run.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def evaluate_and_log(run: Run) -> Evaluation:
    """Evaluates the model on held-out text, logs and prints the result. A collective call."""
    started = run.clock.read()
    result = evaluate(run.model, run.heldout, run.plan.compute_dtype, run.ranks)
    seconds = run.clock.read() - started
    run.schedule.evaluation_s = seconds
    run.record("eval", elapsed_s=run.clock.now, seconds=seconds, **result.to_json())
    nsp = f", NSP accuracy {result.nsp_accuracy:.1%}" if result.nsp_accuracy is not None else ""
    run.say(
        f"step {run.state.step:>6,}: held-out MLM loss {result.mlm_loss:.3f} (unigram entropy "
        f"{run.corpus.unigram_entropy:.3f}), accuracy {result.mlm_accuracy:.1%}{nsp}"
    )
    return result


def save(run: Run) -> Path:
    """Writes a checkpoint. A collective call.

    Raises:
        OSError: no space left, for example. The message says which checkpoint is intact and how to continue.
    """
    state = run.state
    state.elapsed_s = run.clock.elapsed()
    state.loss_scale = run.step.scaler.state_dict() if run.step.scaler is not None else None
    try:
        path = save_checkpoint(run.checkpoints, run.model, run.optimizer, state, ranks=run.ranks)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save step {state.step} ({error.strerror}); {_last_checkpoint(run)}; solve the problem, then "
            f"go on with: {run.resume_command}",
        ) from error
    run.clock.read()
    return path


def _last_checkpoint(run: Run) -> str:
    found = list_checkpoints(run.checkpoints)
    return f"the last checkpoint, {found[0]}, is intact" if found else "there was no checkpoint yet"


def _log_interval(run: Run, interval: Interval, bar: tqdm) -> None:
    """Reads a closed interval, writes a log line and updates the progress bar.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    state = run.state
    fields = interval.read(run.matmul_rate, run.ranks)
    if not math.isfinite(fields["mlm_loss"] + (fields["nsp_loss"] or 0.0) + fields["grad_norm"]):
        raise UserError(
            f"the loss or its gradient is not finite (steps {interval.step - interval.steps + 1} to {interval.step}): "
            f"lower --lr or raise --warmup; {_last_checkpoint(run)}"
        )
    state.train_s += fields["seconds"]
    state.flops += interval.flops
    run.schedule.step_s = fields["seconds"] / interval.steps
    memory = peak_memory_bytes(run.plan.device)
    run.record(
        "train",
        step=interval.step,
        elapsed_s=run.clock.elapsed(),
        tokens=interval.tokens_seen,
        lr=interval.lr,
        memory_bytes=memory,
        **fields,
    )
    if run.settings.minutes is not None:
        left = max(0.0, run.schedule.usable_seconds() - run.clock.now)
        bar.total = state.step + round(left / run.schedule.step_s)
    nsp = f" NSP {fields['nsp_loss']:.3f}" if fields["nsp_loss"] is not None else ""
    bar.set_postfix_str(
        f"MLM {fields['mlm_loss']:.3f}{nsp}, {fields['tokens_per_second']:,.0f} tokens/s, MFU {fields['mfu']:.0%}, "
        f"lr {interval.lr:.1e}, |g| {fields['grad_norm']:.2f}, {memory / 2**30:.1f} GiB"
    )
