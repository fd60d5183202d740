"""The training loop: batches, steps, log lines, evaluations, checkpoints.

The host prepares the next batches while the device computes, and reads losses without waiting for the device. With
several ranks, everything that decides how the run continues is agreed once a step: the clock of rank 0, the label
counts of the step, and whether any rank was told to stop.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from ...model.batch import PackedBatch
from ..batches.loader import batches
from ..batches.mask_schedule import mask_share, thin_masks
from ..errors import UserError, in_words
from ..step.distributed import LostPeer
from ..step.optim import learning_rate
from .checkpoint import BlownUpWeights, save_checkpoint
from .evaluate import Evaluation, evaluate
from .log import read_log
from .metrics import Counts, Interval, Readback, peak_memory_bytes
from .replay import save_window
from .settings import PretrainSettings
from .setup import Run
from .signals import Stopped, StopSignal
from .spikes import Spikes

THINNING = 2  # purpose of a random stream, beside those of batches/dataset.py
MAX_SKIPS = 20  # in a row; fp16 may need 16 to lower its scale from 2^16 to 1


@dataclasses.dataclass
class Done:
    """A step that was queued on the device.

    Attributes:
        step: its number in the run.
        window, seeds: its micro-batches on this rank, and their dropout seeds.
        skipped: `StepResult.skipped`, on the way to the host.
    """

    step: int
    window: list[PackedBatch]
    seeds: list[int]
    skipped: Readback


class RunAheadLimit:
    """Keeps the host at most ``steps`` steps ahead of a GPU.

    Enough that the device always has work queued, and few enough that a signal, the end of the time or a loss that is
    not finite takes effect soon.
    """

    def __init__(self, device: torch.device, steps: int = 8) -> None:
        self._steps = steps if device.type == "cuda" else 0
        self._queued: collections.deque[Done] = collections.deque()

    def step(self, done: Done) -> list[Done]:
        """Call it after each step. Waits for the step that lies ``steps`` back, and returns it."""
        self._queued.append(done)
        return self._first(len(self._queued) - self._steps)

    def drain(self) -> list[Done]:
        """Waits for all steps, and returns those that `step` has not returned."""
        return self._first(len(self._queued))

    def _first(self, count: int) -> list[Done]:
        taken = [self._queued.popleft() for _ in range(count)]
        for done in taken:
            done.skipped.values()
        return taken


class Skips:
    """Counts the steps that were skipped, and ends the run after `MAX_SKIPS` in a row."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._row: list[Done] = []

    def look_at(self, steps: list[Done]) -> None:
        """Call it with each step, in order; a collective call, because all ranks skip the same steps.

        Raises:
            UserError: too many in a row. A checkpoint was saved if the weights are good.
        """
        run = self._run
        for done in steps:
            if not done.skipped.values()[0]:
                self._row = []
                continue
            self._row.append(done)
            run.state.skipped += 1
            run.record("skip", step=done.step, in_a_row=len(self._row))
            if run.step.scaler is None:  # in fp16 a skipped step only lowers the scale
                run.say(f"step {done.step:>6,}: loss or gradient is not finite: skipped, no weight has changed")
            if len(self._row) == MAX_SKIPS:
                self._give_up()

    def _give_up(self) -> None:
        run, first = self._run, self._row[0]
        path = run.settings.out / "nonfinite" / f"step-{first.step:08d}.rank-{run.ranks.rank}.safetensors"
        save_window(path, first.window, first.seeds)
        with contextlib.suppress(BlownUpWeights):
            save(run)
        raise UserError(
            f"the loss or its gradient was not finite in {MAX_SKIPS} steps in a row, from step {first.step} on: lower "
            f"--lr or raise --warmup; the batch of that step is in {path}; {run.last_good()}"
        )


def train(run: Run, stop: StopSignal) -> None:
    """Trains until the run's end.

    Raises as `pretrain.pretrain` does, and `Stopped`.
    """
    settings, plan, state, ranks, schedule = run.settings, run.plan, run.state, run.ranks, run.schedule
    if state.first_evaluation is None:
        state.first_evaluation = evaluate_and_log(run, stop).to_json()
    run.model.train()
    limit, skips = RunAheadLimit(plan.device), Skips(run)
    before = read_log(settings.out / "log.jsonl") if ranks.first and state.step else []
    spikes = Spikes(r["mlm_loss"] for r in before if r["kind"] == "train" and r["mlm_loss"] is not None)
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
        supply = Supply(run, stop)
        if not done:
            counts = supply.fetch()
            if supply.failed:
                supply.fail(f"; solve the problem, then start with: {run.resume_command}" if run.log_error else "")
        stop.arm()
        while not done:
            lr = learning_rate(plan.lr, schedule.progress(), settings.warmup, settings.schedule)
            micro_batches = run.micro_batches
            numbers = range(state.batches + ranks.rank, state.batches + micro_batches, ranks.world_size)
            seeds = [dropout_seed(settings.seed, number) for number in numbers]
            window = supply.window
            result = run.step(window, lr, labels=(counts.num_masked, counts.num_pairs), seeds=seeds)
            interval.add(counts, result)
            state.step += 1
            if run.average is not None:
                run.average.update(state.step)
            finished = limit.step(Done(state.step, window, seeds, Readback(result.skipped[None])))
            state.batches += micro_batches
            state.tokens += counts.tokens
            bar.update()
            if run.enter_phase():
                finished += limit.drain()
                run.step.forget_shapes()
                supply.restart()
                run.say(f"step {state.step:>6,}: from here on segments of up to {run.phase.seqlen} tokens")

            if run.change_step_size():
                run.say(f"step {state.step:>6,}: from here on steps of {run.micro_batches} micro-batches")

            # Prepare the next window while the device computes this one.
            counts = supply.fetch()
            skips.look_at(finished)
            done = schedule.done()
            evaluation_due, save_due = schedule.evaluation_due(), schedule.save_due()
            ending = supply.failed or supply.stopping
            pause = done or evaluation_due or save_due or ending
            if state.step % plan.log_every == 0 or pause:
                interval.close(state.step, state.tokens, lr)
                closed.append(interval)
                interval = Interval(plan.device)
            # Several ranks sum their intervals, so they must read them at the same step, ready or not.
            while closed and (pause or not ranks.alone or closed[0].ready()):
                _log_interval(run, closed.pop(0), bar, spikes)
            if pause:
                skips.look_at(limit.drain())
                check_inputs(run)
                if supply.stopping:
                    raise Stopped(supply.interrupted)
                if supply.failed and not done:
                    supply.fail(f"; saved in {save(run)}; go on with: {run.resume_command}")
                if evaluation_due and not done:  # at the end the caller evaluates and saves
                    is_best, done = selected(run, evaluate_and_log(run, stop))
                    save_due = save_due or is_best
                    schedule.evaluated()
                if save_due and not done:
                    save(run)
                    schedule.saved()
                run.clock.read()
                interval = Interval(plan.device)


class Supply:
    """Fetches the micro-batches of each step, and agrees with the other ranks how to go on.

    Attributes:
        window: the micro-batches of the next step on this rank.
        failed: a rank could not make its batches, or rank 0 not write the log.
        stopping, interrupted: a rank received a signal; it was Ctrl-C.
    """

    def __init__(self, run: Run, stop: StopSignal) -> None:
        self._run, self._stop = run, stop
        self._source = self._batches()
        self.window: list[PackedBatch] = []
        self.failed = self.stopping = self.interrupted = False
        self._error: Exception | None = None

    def restart(self) -> None:
        """Goes on with the batches of the phase that the run has entered."""
        self._source.close()
        self._source = self._batches()

    def _batches(self) -> Generator[PackedBatch, None, None]:
        run, state = self._run, self._run.state
        return batches(
            run.phase.examples,
            num_workers=run.plan.workers,
            start=state.batches - (state.phases[-1] if state.phases else 0),
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
            lanes=state.lanes,
            pin_memory=run.plan.device.type == "cuda",
        )

    def fetch(self) -> Counts:
        """Sets the attributes and returns the counts of all ranks' windows. Reads the clock. A collective call."""
        try:
            count = self._run.micro_batches // self._run.ranks.world_size
            self.window = self._masked([next(self._source) for _ in range(count)])
        except Exception as error:  # raised when all ranks have saved
            self._error = error
        if self._error is None:
            self._error = self._run.log_error
        own = Counts.of(self._run.model.config, self.window)
        shared = [*own, self._run.clock.share(), float(self._error is not None), *self._stop.share()]
        *counts, self._run.clock.now, failed, interrupts, others = self._run.ranks.sum(shared)
        self.failed, self.stopping, self.interrupted = failed > 0, interrupts + others > 0, interrupts > 0
        return Counts(*map(int, counts))

    def _masked(self, window: list[PackedBatch]) -> list[PackedBatch]:
        """``window`` with as many tokens masked as the run has at the moment."""
        settings, state, ranks = self._run.settings, self._run.state, self._run.ranks
        start, end = settings.mlm_probability, settings.mlm_probability_end
        if end is None:
            return window
        keep = mask_share(start, end, self._run.schedule.progress()) / start
        numbers = itertools.count(state.batches + ranks.rank, ranks.world_size)
        return [
            thin_masks(batch, keep, np.random.default_rng((settings.seed, THINNING, number)))
            for batch, number in zip(window, numbers, strict=False)
        ]

    def fail(self, saved: str) -> NoReturn:
        """Raises this rank's error, or on the other ranks `LostPeer`.

        Args:
            saved: what was saved, to append to the error's message.
        """
        if self._error is None:
            raise LostPeer
        if isinstance(self._error, UserError | ValueError | OSError):
            raise UserError(f"{in_words(self._error)}{saved}") from self._error
        self._run.say(saved.removeprefix("; "))
        raise self._error


def dropout_seed(seed: int, number: int) -> int:
    """Seed for the dropout of micro-batch ``number`` of a run, the same on every rank.

    Args:
        seed: of the run.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def evaluate_and_log(run: Run, stop: StopSignal) -> Evaluation:
    """Evaluates the model on held-out text, logs and prints the result. A collective call.

    Raises:
        Stopped: a signal came.
        UserError: the loss is not finite.
    """
    started = run.clock.read()
    with run.average.applied() if run.average is not None else contextlib.nullcontext():
        result = evaluate(run.model, run.phase.heldout, run.plan.compute_dtype, run.ranks, stop)
    if not math.isfinite(result.mlm_loss + (result.nsp_loss or 0.0)):
        raise UserError(
            f"the held-out loss after step {run.state.step} is not finite: the weights have blown up; lower --lr or "
            f"raise --warmup; {run.last_good()}"
        )
    seconds = run.clock.read() - started
    run.schedule.evaluation_s = seconds
    run.record("eval", elapsed_s=run.clock.now, seconds=seconds, seqlen=run.phase.seqlen, **result.to_json())
    nsp = f", NSP accuracy {result.nsp_accuracy:.1%}" if result.nsp_accuracy is not None else ""
    run.say(
        f"step {run.state.step:>6,}: held-out MLM loss {result.mlm_loss:.3f} (unigram entropy "
        f"{run.corpus.unigram_entropy:.3f}), accuracy {result.mlm_accuracy:.1%}{nsp}"
    )
    return result


def selected(run: Run, result: Evaluation) -> tuple[bool, bool]:
    """With --keep-best: whether this evaluation is the best so far, and whether --patience ends the run."""
    state, patience = run.state, run.settings.patience
    if not keeps_best(run.settings):
        return False, False
    best = state.selection
    if best is None or result.mlm_loss < best["scores"]["mlm_loss"]:
        state.selection = {"step": state.step, "scores": result.to_json(), "since": 0}
        return True, False
    state.selection = {**best, "since": best["since"] + 1}
    ends = patience is not None and state.selection["since"] >= patience
    if ends:
        run.say(
            f"step {state.step:>6,}: no lower held-out loss in {patience} evaluations since step {best['step']:,}: "
            "the run ends (--patience)"
        )
    return False, ends


def keeps_best(settings: PretrainSettings) -> bool:
    """Whether the checkpoint of the best evaluation is kept, and exported."""
    return settings.keep_best or settings.patience is not None


def save(run: Run) -> Path:
    """Writes a checkpoint. A collective call.

    Raises:
        BlownUpWeights: the weights are not finite. The message names the last good checkpoint.
        OSError: no space left, for example.
    """
    state = run.state
    state.elapsed_s = run.clock.elapsed()
    state.loss_scale = run.step.scaler.state_dict() if run.step.scaler is not None else None
    try:
        path = save_checkpoint(
            run.checkpoints,
            run.model,
            run.optimizer,
            state,
            run.settings.keep,
            run.ranks,
            spare=state.selection["step"] if state.selection is not None else None,
        )
    except BlownUpWeights as error:
        raise BlownUpWeights(
            f"the weights have blown up by step {state.step} ({error}): not saved; lower --lr or raise --warmup; "
            f"{run.last_good()}"
        ) from error
    run.clock.read()
    return path


@contextlib.contextmanager
def errors_explained(run: Run) -> Iterator[None]:
    """Errors of the operating system, such as a full disk, get the last good checkpoint and the command to go on."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; {run.last_good()}; solve the problem, then go on with: "
        raise OSError(error.errno, reason + run.resume_command, error.filename) from error


def check_inputs(run: Run) -> None:
    """Says which files of the corpus were deleted or replaced since the last call. Rank 0 looks; a collective call.

    Raises:
        UserError: a file was overwritten, so that the text of the run changed.
    """
    try:
        changes = run.ranks.from_first(run.inputs.changes)
    except UserError as error:
        raise UserError(f"{error}; {run.last_good()}") from error
    if changes:
        more = f" and {len(changes) - 1} more files" if len(changes) > 1 else ""
        run.warn(
            f"{changes[0]}{more} during the run; the run goes on with the text that it started with, but cannot be "
            "resumed without that corpus"
        )


def _log_interval(run: Run, interval: Interval, bar: tqdm, spikes: Spikes) -> None:
    """Reads a closed interval, writes a log line and updates the progress bar."""
    state = run.state
    fields = interval.read(run.matmul_rate, run.ranks)
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
    if fields["mlm_loss"] is None:  # all steps were skipped
        return
    spike = spikes.add(fields["mlm_loss"])
    if spike is not None:
        state.spikes += 1
        run.record("spike", step=interval.step, mlm_loss=fields["mlm_loss"], level=spike[0], limit=spike[1])
        run.warn(
            f"step {interval.step:,}: the training loss, {fields['mlm_loss']:.3f}, is far above its recent level, "
            f"{spike[0]:.3f}; if it does not come back, lower --lr"
        )
    bar.set_postfix_str(
        f"MLM {fields['mlm_loss']:.3f}{nsp}, {fields['tokens_per_second']:,.0f} tokens/s, MFU {fields['mfu']:.0%}, "
        f"lr {interval.lr:.1e}, |g| {fields['grad_norm']:.2f}, {memory / 2**30:.1f} GiB"
    )
