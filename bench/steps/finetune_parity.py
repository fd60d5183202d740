"""Fine-tuning by us and by Transformers, from the same weights on the same texts in the same order: equally good?

Each seed gives one head and one order to both. Dropout draws its own masks in each, so the scores differ by the noise
of a seed. Ours is ``fusebert finetune --task classify`` without choosing an epoch. Theirs is a plain loop of what
Trainer does, on batches padded to their longest text, with the same optimiser, clipping and learning rates. Both are
scored on the dev texts after the last epoch.
"""

from __future__ import annotations

import itertools
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.hf.encoders import open_encoder
from ...model.text_batch import TextBatch
from ...train.errors import UserError
from ...train.run.log import read_log
from ...train.run.signals import StopSignal
from ...train.step.optim import learning_rate, make_optimizer, set_learning_rate
from ...train.step.step import autocast
from ...train.tasks.class_report import LabelPredictions
from ...train.tasks.job import Job, prepare_job
from ...train.tasks.models import choose_machine
from ...train.tasks.seed_run import train_seed
from ...train.tasks.settings import FinetuneSettings
from ...train.text.pydocs import docstrings, python_files
from ..measure.machine import environment, nvidia_smi
from ..measure.result import FinetuneParityResult, write_result
from ..measure.settings import FinetuneParityOptions, FinetuneParitySettings, settings_of
from ..measure.statistics import paired_difference
from .embed import PRECISIONS, model_folder

PACKAGES, DEV_RATIO = 5, 2  # classes of the built-in texts; dev texts for each training text
MIN_CHARS, MAX_CHARS = 40, 200


def run(
    options: FinetuneParityOptions, device: torch.device, *, show: Callable[[Any], None] = print
) -> FinetuneParityResult:
    """Train both with each seed, show the scores, and return (and write) the result.

    Args:
        options: resolved for the device.
        show: takes the environment, a line a seed, and the result.

    Raises:
        UserError: an option or a text cannot be used, or Transformers is not installed.
        ValueError: the model cannot be used.
    """
    begin = time.monotonic()
    if options.seeds < 2:
        raise UserError(f"--seeds must be at least 2, for a spread; got {options.seeds}")
    if (options.train is None) != (options.dev is None):
        raise UserError("--train and --dev go together: give both, or neither")
    try:
        import transformers  # noqa: F401 (better now than after the first run)
    except ImportError as error:
        raise UserError("bench finetune-parity needs Transformers: pip install transformers") from error
    where = environment(device)
    show(where)
    folder = open_encoder(model_folder(options.model))
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fusebert-parity-") as place:
        train, dev = options.train, options.dev
        if train is None or dev is None:
            train, dev = write_texts(Path(place), options.count)
        settings = FinetuneSettings(
            model=folder.directory,
            task="classify",
            train=[train],
            dev=dev,
            out=Path(place) / "run",
            seqlen=options.seqlen,
            epochs=options.epochs,
            batch_size=options.batch,
            lr=options.lr,
            seeds=options.seeds,
            tensorboard=False,
            threads=options.threads,
            device=device.type,
            precision=PRECISIONS[options.compute_dtype],
        )
        job = prepare_job(settings, choose_machine(settings), folder)
        for seed in range(options.seeds):
            with StopSignal() as stop:
                train_seed(job, seed, stop)
            *_, last = (r for r in read_log(settings.out / f"seed-{seed}" / "log.jsonl") if r["kind"] == "dev")
            ours.append(last["accuracy"])
            theirs.append(train_transformers(job, seed, Path(place)).scores()["accuracy"])
            show(f"seed {seed}: dev accuracy {ours[-1]:.4f}, with Transformers {theirs[-1]:.4f}")
        texts, scored = job.task.train.lengths, len(job.task.splits["dev"][0])  # type: ignore[union-attr]
    names = {"model": Path(options.model).name, "threads": torch.get_num_threads()}
    names |= {name: given and Path(given).name for name, given in (("train", options.train), ("dev", options.dev))}
    result = FinetuneParityResult(
        environment=where,
        settings=settings_of(FinetuneParitySettings, options, **names),
        architecture=f"{folder.family.class_name}, {folder.config.num_hidden_layers} layers of "
        f"{folder.config.hidden_size}",
        classes=len(job.task.labels.names),  # type: ignore[union-attr]
        train_texts=len(texts),
        dev_texts=scored,
        mean_tokens=float(texts.mean()),
        accuracy={"fusebert": ours, "transformers": theirs},
        difference=paired_difference(ours, theirs),
        seconds=time.monotonic() - begin,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result


def train_transformers(job: Job, seed: int, place: Path) -> LabelPredictions:
    """The dev predictions of Transformers' model, trained as `train_seed` trains ours.

    Args:
        place: a folder for the first weights.
    """
    from transformers import AutoModelForSequenceClassification

    settings, machine = job.settings, job.machine
    start, _ = job.model(seed)  # the same head: it is drawn from the seed
    first = place / f"transformers-{seed}"
    job.save(start, first)
    model = AutoModelForSequenceClassification.from_pretrained(first, attn_implementation="sdpa").to(machine.device)
    optimizer = make_optimizer(model, settings.lr, settings.weight_decay)
    batches, pad = job.batches(seed), job.folder.config.pad_token_id or 0
    total = batches.steps * settings.epochs
    torch.manual_seed(seed)  # of dropout
    model.train()
    steps = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in range(settings.epochs))
    for number, window in enumerate(steps):
        set_learning_rate(optimizer, learning_rate(settings.lr, (number + 0.5) / total, settings.warmup))
        texts = [text for batch in window for text in segments(batch)]
        inputs = padded(texts, pad)
        inputs["labels"] = torch.cat([batch.labels[: batch.num_labels] for batch in window])
        with autocast(machine.device, machine.compute_dtype):
            loss = model(**{name: x.to(machine.device) for name, x in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    rows, examples = job.task.splits["dev"]
    logits: list[np.ndarray] = []
    with torch.no_grad(), autocast(machine.device, machine.compute_dtype):
        for i in range(0, len(rows), settings.batch_size):
            texts = [torch.from_numpy(text.ids) for text in examples.texts[i : i + settings.batch_size]]
            inputs = {name: x.to(machine.device) for name, x in padded(texts, pad).items()}
            logits += [*model(**inputs).logits.float().cpu().numpy()]
    return LabelPredictions(job.task.labels, rows, examples.labels, np.stack(logits))  # type: ignore[union-attr]


def segments(batch: TextBatch) -> list[Tensor]:
    """The token ids of each labelled text."""
    bounds = itertools.pairwise(batch.cu_seqlens[: batch.num_labels + 1].tolist())
    return [batch.input_ids[start:end] for start, end in bounds]


def padded(texts: list[Tensor], pad: int) -> dict[str, Tensor]:
    """int64 [B, N] both: the texts, padded to the longest, and their mask."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def write_texts(place: Path, count: int) -> tuple[str, str]:
    """train.jsonl, of ``count`` texts, and dev.jsonl: which package is the first sentence of a docstring from?

    Raises:
        UserError: there are too few docstrings.
    """
    wanted = {"train": -(-count // PACKAGES), "dev": -(-DEV_RATIO * count // PACKAGES)}
    found: dict[str, dict[str, list[str]]] = {}
    full: list[str] = []
    for package, split, text in _sentences():
        lists = found.setdefault(package, {name: [] for name in wanted})
        if len(lists[split]) < wanted[split]:
            lists[split].append(text)
            if all(len(lists[name]) == wanted[name] for name in wanted):
                full.append(package)
                if len(full) == PACKAGES:
                    break
    else:
        raise UserError(f"the installed packages have too few docstrings for --count {count}: give --train and --dev")
    for name in wanted:
        rows = ({"text": text, "label": package} for package in full for text in found[package][name])
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(place / "train.jsonl"), str(place / "dev.jsonl")


def _sentences() -> Iterator[tuple[str, str, str]]:
    """(Package, split, sentence). A file is in one split; a sentence is there once, and does not name its package."""
    root, seen = Path(sysconfig.get_path("purelib")), set()
    for number, path in enumerate(each for each in python_files() if each.is_relative_to(root)):
        package = path.relative_to(root).parts[0]
        try:
            texts = docstrings(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for text in texts:
            sentence = " ".join(text.split()).split(". ")[0][:MAX_CHARS]
            if len(sentence) >= MIN_CHARS and package.lower() not in sentence.lower() and sentence not in seen:
                seen.add(sentence)
                yield package, "train" if number % 3 == 0 else "dev", sentence
