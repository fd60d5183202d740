"""``fusebert finetune``: an encoder and a head trained on labelled texts, with one or several seeds.

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
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...model.atomic import replace_file
from ...model.heads import SINGLE
from ...model.hf.encoders import EncoderFolder
from ...model.hf.format import CONFIG_FILE, WEIGHTS_FILE
from ...model.hf.save_classifier import copied_tokenizer
from ..corpus.format import file_sha256
from ..environment import commit, processor, source_sha256, versions
from ..errors import UserError
from ..run.lock import RunLock
from ..run.manifest import FILE, PACKAGES, settings_json
from ..run.resume import check_identity
from ..run.signals import Interrupted, Stopped, StopSignal, exit_status
from ..run.strict_json import strict_json
from .classifier import make_classifier, predict_logits
from .examples import Examples, encode_rows, read_all
from .finetune_report import Predictions, write_report
from .labels import TASKS, Labels
from .models import choose_machine, open_folder
from .rows import Columns
from .scores import choose_metric, goodness
from .seed_run import Job, say, train_seed
from .settings import FinetuneSettings
from .tokens import TextTokenizer

# Options that may differ when a run is continued.
FREE = {"out", "resume", "seeds", "device", "threads", "tensorboard", "graph", "model", "train", "dev"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        out: its folder.
        metric: that chose the models.
        results: of `train_seed`, in the order of the seeds.
        best: the best of them.
    """

    out: Path
    metric: str
    results: list[dict[str, Any]]
    best: dict[str, Any]

    def means(self) -> dict[str, tuple[float, float | None]]:
        """(Mean, standard deviation over the seeds) of each score; None with one seed."""
        found = {}
        for name in self.best["scores"]:
            values = [float("nan") if (x := each["scores"][name]) is None else x for each in self.results]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            found[name] = float(np.mean(values)), spread
        return found

    def lines(self) -> list[str]:
        """The scores in words."""
        seeds = f", mean ± standard deviation of {len(self.results)} seeds" if len(self.results) > 1 else ""
        return [
            f"on the dev texts{seeds}:",
            *(f"  {name:10} {words}" for name, words in self.in_words().items()),
            self.chosen(),
            f"model: {self.out / 'hf'}",
            f"report: {self.out / 'report.html'}",
        ]

    def in_words(self) -> dict[str, str]:
        """Mean and standard deviation of each score."""
        return {
            name: f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
            for name, (mean, spread) in self.means().items()
        }

    def chosen(self) -> str:
        """Which model is the best one."""
        return f"best by {self.metric}: seed {self.best['seed']}, epoch {self.best['best_epoch']:g}"


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
    _check(settings)
    machine = choose_machine(settings)
    folder = open_folder(settings.model)
    layers = folder.config.num_hidden_layers
    if settings.freeze_layers > layers:
        raise UserError(f"--freeze-layers must be from 0 to {layers}, the model's layers; got {settings.freeze_layers}")
    lock = RunLock(settings.out)
    try:
        identity = _identity(settings, folder)
        _check_place(settings, identity)
        job = _prepare(settings, machine, folder)
        _write_manifest(settings, identity, resume_command, str(machine.device))
        with _errors_explained(resume_command):
            seeds = range(settings.seed, settings.seed + settings.seeds)
            return _conclude(job, [train_seed(job, seed, stop) for seed in seeds])
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


def _check(settings: FinetuneSettings) -> None:
    if settings.task not in TASKS:
        raise UserError(f"--task must be one of {', '.join(TASKS)}; got {settings.task!r}")
    if settings.label_separator == "":
        raise UserError("--label-separator must not be empty")
    for name in ("label_separator", "class_weights"):
        if settings.task == "regress" and getattr(settings, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --task classify")
    for name, low, high in (("lr", 0.0, 1.0), ("clip", 0.0, 1e9), ("layer_decay", 0.0, 1.0)):
        if not low < getattr(settings, name) <= high:
            given = getattr(settings, name)
            raise UserError(f"--{name.replace('_', '-')} must be above {low:g} and at most {high:g}; got {given}")
    for name in ("warmup", "weight_decay"):
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"--{name.replace('_', '-')} must be from 0 to below 1; got {getattr(settings, name)}")
    if settings.seed + settings.seeds > 1 << 32:
        raise UserError(f"--seed must be below 2³²; got {settings.seed}")


def _prepare(settings: FinetuneSettings, machine: Any, folder: EncoderFolder) -> Job:
    """Reads and encodes the texts and their labels."""
    separator = settings.label_separator
    columns = Columns(
        settings.text, settings.text_pair, settings.label, labelled=True, empty_labels=separator is not None
    )
    train, dev = read_all(settings.train, columns, "--train"), read_all([settings.dev], columns, "--dev")
    (head,) = folder.family.names(folder.config.num_hidden_layers)["out.weight"]
    labels = Labels.of(train, settings.task, separator, folder.label_names if head in folder.tensors else None)
    metric = choose_metric(settings.metric, labels.problem)
    train_labels, dev_labels = labels.encode(train), labels.encode(dev)
    weights = _class_weights(settings.class_weights, labels, train_labels)
    tokenizer = TextTokenizer(folder, settings.seqlen)
    job = Job(
        settings=settings,
        machine=machine,
        folder=folder,
        labels=labels,
        tokenizer=copied_tokenizer(folder.directory, tokenizer.seqlen),
        train=Examples(encode_rows(tokenizer, train), train_labels),
        dev=Examples(encode_rows(tokenizer, dev), dev_labels),
        dev_rows=dev,
        class_weights=weights,
        metric=metric,
    )
    known = {(row.text, row.pair) for row in train}
    seen = sum((row.text, row.pair) in known for row in dev)
    what = f"{len(labels.names)} classes" if settings.task == "classify" else "a number each"
    say(f"{len(train):,} training texts, {len(dev):,} dev texts, {what}; a text has up to {tokenizer.seqlen} tokens")
    if labels.names == tuple(folder.label_names or ()) and head in folder.tensors:
        say("the model's own head is trained on, for its classes")
    for warning in filter(None, [tokenizer.warning()]):
        say(warning)
    if seen:
        say(f"warning: {seen:,} of {len(dev):,} dev texts are training texts too: the scores are too good")
    return job


def _class_weights(given: str | None, labels: Labels, encoded: torch.Tensor) -> list[float] | None:
    """The factor of each class.

    Raises:
        UserError: ``given`` is not understood, or a text has several classes.
    """
    if given is None:
        return None
    if labels.problem != SINGLE:
        raise UserError("--class-weights needs one class a text: leave out --label-separator")
    if given == "balanced":
        counts = torch.bincount(encoded, minlength=len(labels.names)).clamp(min=1)
        weights: list[float] = (len(encoded) / (len(labels.names) * counts.double())).tolist()
        return weights
    factors = dict.fromkeys(labels.names, 1.0)
    for part in given.split(","):
        name, _, number = part.rpartition("=")
        try:
            factors[name] = float(number) if name in factors else -1.0
        except ValueError:
            factors[name] = -1.0
        if not 0.0 <= factors[name] < 1e9:
            raise UserError(
                f"--class-weights {part!r} is not NAME=NUMBER with one of the classes {', '.join(labels.names[:8])}"
            )
    return list(factors.values())


def _identity(settings: FinetuneSettings, folder: EncoderFolder) -> dict[str, Any]:
    """What must not change when a run is continued, by the name of the option."""
    files = [folder.directory / name for name in (CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json")]
    options = {name: value for name, value in settings_json(settings).items() if name not in FREE}
    return {
        "--model": [file_sha256(path) for path in files if path.is_file()],
        "--train": [_sha256(path) for path in settings.train],
        "--dev": _sha256(settings.dev),
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
    }


def _sha256(path: str) -> str | None:
    return file_sha256(Path(path)) if Path(path).is_file() else None  # `read_rows` names what is missing


def _check_place(settings: FinetuneSettings, identity: dict[str, Any]) -> None:
    """Raises UserError if the folder has another run, or this run and no ``--resume``."""
    path = settings.out / FILE
    if not path.is_file():
        if any(settings.out.glob("checkpoints/step-*")):
            raise UserError(f"{settings.out} is the folder of another run: give another --out")
        return
    if not settings.resume:
        raise UserError(f"{settings.out} already holds a run: give --resume to continue it, or another --out")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved = content["identity"]
        if "--task" not in saved:
            raise UserError(f"{settings.out} is the folder of another run: give another --out")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): give another --out") from error
    check_identity(saved, json.loads(strict_json(identity)), settings.out)


def _write_manifest(settings: FinetuneSettings, identity: dict[str, Any], command: str, device: str) -> None:
    content = {
        "version": 1,
        "command": command,
        "settings": settings_json(settings),
        "identity": identity,
        "device": device,
        "versions": versions((*PACKAGES, "scikit-learn")),
        "commit": commit(),
        "source_sha256": source_sha256(),
        "processor": processor(),
    }
    with replace_file(settings.out / FILE) as partial:
        partial.write_text(strict_json(content, indent=1) + "\n", encoding="utf-8")


def _conclude(job: Job, results: list[dict[str, Any]]) -> Outcome:
    """Copies the best seed's model to hf/ and writes the report about it."""
    out = job.settings.out
    best = max(results, key=lambda result: goodness(job.metric, result["scores"]))
    _link_folder(out / f"seed-{best['seed']}" / "hf", out / "hf")
    outcome = Outcome(out, job.metric, results, best)
    folder = open_folder(out / "hf")
    model = make_classifier(folder, job.labels, needs=("dense", "out"))[0].to(job.machine.device)
    logits = predict_logits(model, job.dev.texts, job.machine)
    predictions = Predictions(job.labels, job.dev_rows, job.dev.labels, logits)
    settings = job.settings
    title = f"{settings.model}: {settings.task}, {len(job.train.texts):,} training texts, {len(logits):,} dev texts"
    tokens, seconds = sum(each["tokens"] for each in results), sum(each["seconds"] for each in results)
    facts = f"{tokens:,} tokens in {seconds:,.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s, evaluations included"
    figures = [[f"seed {each['seed']}", *each["scores"].values()] for each in results]
    if len(results) > 1:
        figures.append(["mean ± standard deviation", *outcome.in_words().values()])
    write_report(out, title, [f"{outcome.chosen()}.", facts], (["", *best["scores"]], figures), predictions)
    content = {
        "metric": job.metric,
        "best_seed": best["seed"],
        "scores": {name: {"mean": mean, "stdev": spread} for name, (mean, spread) in outcome.means().items()},
        "seeds": results,
        "classes": predictions.per_class(),
    }
    with replace_file(out / "report.json") as partial:
        partial.write_text(strict_json(content, indent=1) + "\n", encoding="utf-8")
    return outcome


def _link_folder(source: Path, target: Path) -> None:
    """A copy of a folder of files, by hard links where the file system has them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
