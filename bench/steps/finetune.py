"""A fine-tuning step of ``fusebert finetune`` (classify) against the step of Transformers' Trainer, on the same texts.

    fusebert                      packed without padding
    transformers, dynamic         padded to the longest text of the batch (DataCollatorWithPadding)
    transformers, max_length      padded to the model's longest text

A step makes the batch, of texts that are tokenised already, and does forward, backward, clip and AdamW. Transformers'
is a plain loop of what Trainer does, without its callbacks and accelerate's wrappers, and with tensors in place of its
collator: that favours it. All start from one model with a random head, and see the same texts in the same order.

Before anything is timed, the losses of the first steps are compared, in float32 without dropout: relative difference
up to 1e-4.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...model.heads import SINGLE
from ...model.hf.encoders import EncoderFolder, open_encoder
from ...model.hf.save_classifier import save_classifier
from ...model.text_batch import TextBatch
from ...train.errors import UserError
from ...train.step.optim import make_optimizer
from ...train.step.step import TrainingStep, autocast
from ...train.tasks.classifier import make_classifier
from ...train.tasks.examples import EpochBatches, Examples
from ...train.tasks.labels import Labels
from ...train.tasks.models import TOKENS_PER_BATCH
from ...train.tasks.tokens import TextTokenizer
from ..measure.case import OURS, PEER
from ..measure.correctness import RIGHT, WRONG, Verdict
from ..measure.machine import environment, nvidia_smi
from ..measure.result import FinetuneResult, FuseContestant, FuseTime, write_result
from ..measure.settings import FinetuneBenchOptions, FinetuneBenchSettings, settings_of
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave
from .embed import model_folder, read_texts

TOLERANCE = 1e-4  # relative, of a loss
PARITY_STEPS, QUICK_STEPS = 20, 3
CLASSES, LEARNING_RATE, WEIGHT_DECAY, CLIP = 4, 2e-5, 0.01, 1.0
MINUTES = 3.0


def run(options: FinetuneBenchOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> FinetuneResult:
    """Run the benchmark, show what it finds, and return (and write) the result.

    Args:
        options: resolved for the device.
        show: takes each record as it is made: environment, the result.

    Raises:
        UserError: an option cannot be used, or Transformers is not installed.
        ValueError: the model cannot be used.
    """
    begin = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = open_encoder(model_folder(options.model))
    texts = list(itertools.islice(read_texts(options), 4 * options.batch if options.quick else options.count))
    if len(texts) < options.batch:
        raise UserError(f"--batch {options.batch} needs as many texts; there are {len(texts)}")
    tokenizer = TextTokenizer(folder, options.seqlen)
    labels = torch.randint(0, CLASSES, (len(texts),), generator=torch.Generator().manual_seed(0))
    examples = Examples(tokenizer(texts), labels)
    where = environment(device)
    show(where)
    dtype = getattr(torch, options.compute_dtype)
    given = folder, examples, options.batch, device
    makers: dict[str, Callable[[torch.dtype], Trained]] = {
        "fusebert": lambda dtype: Ours(*given, dtype),
        "transformers, dynamic": lambda dtype: Theirs(*given, dtype, None),
        "transformers, max_length": lambda dtype: Theirs(*given, dtype, tokenizer.seqlen),
    }
    steps = QUICK_STEPS if options.quick else PARITY_STEPS
    losses = {name: _losses(makers[name](torch.float32), steps) for name in list(makers)[:2]}
    ours, theirs = losses.values()
    worst = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    right = worst <= TOLERANCE
    detail = "" if right else f"a loss of the first {steps} steps differs by {worst:.1e} of it, more than {TOLERANCE:g}"
    verdict = Verdict(RIGHT if right else WRONG, {"loss": worst}, detail=detail)

    trained = {name: make(dtype) for name, make in makers.items() if right or name != "fusebert"}
    works = {name: Work(each.step) for name, each in trained.items()}
    for each in trained.values():
        each.model.train()
    limits: dict[str, Any] = {"min_rounds": 2, "max_rounds": 3} if options.quick else {}
    seconds = 0.2 if options.quick else 60 * (options.minutes or MINUTES)
    timings = interleave(works, device, seconds=seconds, calls=1, **limits)
    rows = []
    for name in makers:
        timing, found = timings.get(name), None
        if timing is not None:
            against = ratio(timing.samples_ms, timings["fusebert"].samples_ms) if right else None
            tokens = sum(trained[name].tokens(i) for i in range(timing.rounds))
            found = FuseTime(timing, against, 1e3 * tokens / sum(timing.samples_ms))
        role = OURS if name == "fusebert" else PEER
        rows.append(FuseContestant(name, role, verdict if role == OURS else Verdict(RIGHT), found))
    lengths = examples.lengths
    chosen: dict[str, Any] = {"model": Path(options.model).name, "texts": options.texts and Path(options.texts).name}
    chosen |= {"seqlen": tokenizer.seqlen, "threads": torch.get_num_threads(), "count": len(texts)}
    result = FinetuneResult(
        environment=where,
        settings=settings_of(FinetuneBenchSettings, options, **chosen),
        architecture=f"{folder.family.class_name}, {folder.config.num_hidden_layers} layers of "
        f"{folder.config.hidden_size}",
        mean_tokens=float(lengths.mean()),
        losses=losses,
        contestants=tuple(rows),
        seconds=time.monotonic() - begin,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result


class Trained:
    """A model that is trained step by step over the same batches again and again.

    Attributes:
        model: in training mode unless set otherwise.
    """

    model: nn.Module

    def __init__(self, examples: Examples, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.examples, self.device, self.dtype = examples, device, dtype
        static = device.type == "cuda"
        self.batches = EpochBatches(examples, batch, TOKENS_PER_BATCH[device.type], seed=0, epochs=1, static=static)

    def window(self, number: int) -> list[TextBatch]:
        """The micro-batches of step ``number``."""
        return next(self.batches.epoch(0, number % self.batches.steps))

    def tokens(self, number: int) -> int:
        """Real tokens of step ``number``."""
        return sum(batch.num_tokens for batch in self.window(number))

    def step(self, number: int) -> Tensor:
        """Trains, and returns the mean loss, on the device."""
        raise NotImplementedError


class Ours(Trained):
    """``fusebert finetune``'s step."""

    def __init__(
        self, folder: EncoderFolder, examples: Examples, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(examples, batch, device, dtype)
        self.model = _classifier(folder)[0].to(device)
        optimizer, graph = make_optimizer(self.model, LEARNING_RATE, WEIGHT_DECAY), device.type == "cuda"
        self._step = TrainingStep(self.model, optimizer, clip=CLIP, compute_dtype=dtype, graph=graph, losses=1)

    def step(self, number: int) -> Tensor:
        window = self.window(number)
        return self._step(window, LEARNING_RATE).sums[0] / sum(batch.num_labels for batch in window)


class Theirs(Trained):
    """What Transformers' Trainer does in a step.

    Args:
        longest: tokens that each text is padded to; None: the batch's longest.
    """

    def __init__(
        self,
        folder: EncoderFolder,
        examples: Examples,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        longest: int | None,
    ) -> None:
        super().__init__(examples, batch, device, dtype)
        try:
            import transformers
        except ImportError as error:
            raise UserError("bench finetune needs Transformers: pip install transformers") from error
        model, labels = _classifier(folder)
        with tempfile.TemporaryDirectory() as place:
            save_classifier(model, Path(place) / "hf", folder, labels.names, {})
            kind = transformers.AutoModelForSequenceClassification
            self.model = kind.from_pretrained(Path(place) / "hf", attn_implementation="sdpa").to(device)
        self._optimizer = make_optimizer(self.model, LEARNING_RATE, WEIGHT_DECAY)
        self._longest, self._pad = longest, folder.config.pad_token_id or 0
        numbered = Examples(examples.texts, torch.arange(len(examples.texts)))
        windows = EpochBatches(numbered, batch, 1 << 20, seed=0, epochs=1, static=False).epoch(0)
        self._numbers = [torch.cat([part.labels for part in window]).numpy() for window in windows]

    def step(self, number: int) -> Tensor:
        chosen = self._numbers[number % len(self._numbers)]
        texts = [self.examples.texts[i] for i in chosen]
        lengths = torch.tensor([len(text) for text in texts])
        longest = int(lengths.max()) if self._longest is None else self._longest
        ids = np.full((len(texts), longest), self._pad, dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text.ids
        mask = (torch.arange(longest) < lengths[:, None]).long()  # [B, N]
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": mask,
            "labels": self.examples.labels[torch.from_numpy(chosen)],
        }
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in inputs.items()}
        with autocast(self.device, self.dtype):
            loss: Tensor = self.model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def _classifier(folder: EncoderFolder) -> tuple[Any, Labels]:
    """The model that all start from: the folder's weights and a random head."""
    torch.manual_seed(0)
    labels = Labels(SINGLE, tuple(f"class {i}" for i in range(CLASSES)))
    return make_classifier(folder, labels)[0], labels


def _losses(trained: Trained, steps: int) -> list[float]:
    """Of the first ``steps`` steps, without dropout."""
    trained.model.eval()
    return [float(trained.step(i)) for i in range(steps)]
