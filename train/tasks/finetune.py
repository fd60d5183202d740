"""``fusebert finetune``: an encoder and its head trained for a task, with one or several seeds.

    OUT/run.json                    settings, versions, hashes
        seed-N/log.jsonl            a line an interval and an epoch; tensorboard/
        seed-N/checkpoints/         until the seed is done
        seed-N/hf/, result.json     the best model of the seed, its scores
        hf/                         the best seed's
        report.json, report.html    scores of all seeds; what the best model gets right and wrong; report.png

A step has ``batch_size`` texts, packed without padding. Its loss is the mean over their labels. The order of the texts,
the dropout and the head's first weights are functions of the seed, so that a run that was stopped continues exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import UserError
from ..run.lock import RunLock
from ..run.signals import Interrupted, Stopped, StopSignal, exit_status
from .job import check_settings, prepare_job
from .models import choose_machine, open_folder
from .outcome import Outcome, conclude
from .run_identity import check_place, identity_of, write_run_json
from .seed_run import train_seed
from .settings import FinetuneSettings


def finetune(settings: FinetuneSettings, stop: StopSignal, resume_command: str) -> Outcome:
    """Runs ``fusebert finetune``.

    Args:
        stop: handles signals.
        resume_command: the command that continues the run, for messages.

    Raises:
        UserError, ValueError: an option, the model or a row cannot be used, or the training failed.
        OSError: for example no space left.
        signals.Interrupted: a signal came; a checkpoint was saved.
    """
    check_settings(settings)
    machine = choose_machine(settings)
    folder = open_folder(settings.model)
    lock = RunLock(settings.out)
    try:
        identity = identity_of(settings, folder)
        check_place(settings, identity)
        job = prepare_job(settings, machine, folder)
        write_run_json(settings, identity, resume_command, str(machine.device))
        with _errors_explained(resume_command):
            seeds = range(settings.seed, settings.seed + settings.seeds)
            return conclude(job, [train_seed(job, seed, stop) for seed in seeds])
    except Stopped as stopped:
        message = f"stopped and saved; go on with:\n{resume_command}"
        raise Interrupted(message, exit_status(stopped.interrupted)) from None
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full: lower --tokens-per-batch; a step keeps its --batch-size") from error
    finally:
        lock.release()


@contextlib.contextmanager
def _errors_explained(resume_command: str) -> Iterator[None]:
    """Errors of the operating system, such as a full disk, get the command to go on."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; solve the problem, then go on with: {resume_command}"
        raise OSError(error.errno, reason, error.filename) from error
