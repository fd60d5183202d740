"""What ``fusebert finetune`` reads before it trains: options, model, texts, labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...model.heads import SpanPredictor
from ...model.hf.encoders import EncoderFolder
from ..errors import UserError
from ..step.step import TrainingStep
from .classify_task import read_classify_task
from .contrast_step import ContrastiveStep
from .contrast_task import ContrastTask, read_contrast_task
from .examples import EpochBatches
from .models import Machine
from .pairs import PairBatches
from .qa.task import AnswerTask, read_answer_task
from .settings import FinetuneSettings
from .tag.task import read_tag_task
from .task import Task

MOST_EPOCHS = 10_000  # the order of all is known before the first step
TASKS: dict[str, Callable[[FinetuneSettings, Machine, EncoderFolder], Task | ContrastTask]] = {
    "classify": read_classify_task,
    "regress": read_classify_task,
    "tag": read_tag_task,
    "qa": read_answer_task,
    "embed": read_contrast_task,
}
ONLY_FOR = {  # option → the tasks that it is for
    "text_pair": ("classify", "regress", "embed"),
    "text": ("classify", "regress", "tag", "embed"),
    "label": ("classify", "regress", "tag", "embed"),
    "label_separator": ("classify",),
    "class_weights": ("classify",),
    "stride": ("tag", "qa"),
    "negative": ("embed",),
    "score_range": ("embed",),
    "normalize": ("embed",),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What the seeds of a run share.

    Attributes:
        folder: of the model to start from.
        task: the texts, and what their labels mean.
    """

    settings: FinetuneSettings
    machine: Machine
    folder: EncoderFolder
    task: Task | ContrastTask

    @property
    def metric(self) -> str:
        """The name of the score that chooses the best model."""
        return self.task.metric

    @property
    def _graph(self) -> bool:
        return self.settings.graph and self.machine.device.type == "cuda"

    def model(self, seed: int) -> tuple[nn.Module, list[str]]:
        """The model before the first step, on its device, and what to tell the user about its weights."""
        torch.manual_seed(seed)
        model, notes = self.task.make_model(self.folder)
        frozen, encoder = self.settings.freeze_layers, _encoder(model)
        for part in [encoder.embeddings, *encoder.layers[:frozen]] if frozen else []:
            part.requires_grad_(False)
        return model.to(self.machine.device), notes

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingStep | ContrastiveStep:
        """See `seed_run.Job`, as for the methods below."""
        dtype, clip = self.machine.compute_dtype, self.settings.clip
        if isinstance(self.task, ContrastTask):  # its micro-batches differ in shape
            return self.task.step(TrainingStep(model, optimizer, clip=clip, compute_dtype=dtype, losses=1))
        return TrainingStep(model, optimizer, clip=clip, compute_dtype=dtype, graph=self._graph, losses=1)

    def batches(self, seed: int) -> EpochBatches | PairBatches:
        settings, tokens = self.settings, self.machine.tokens_per_batch
        if isinstance(self.task, ContrastTask):
            return PairBatches(self.task.train, settings.batch_size, tokens, seed)
        return EpochBatches(self.task.train, settings.batch_size, tokens, seed, settings.epochs, static=self._graph)

    def scores(self, model: nn.Module) -> dict[str, float]:
        if isinstance(self.task, AnswerTask):
            return self.task.choose_threshold(cast(SpanPredictor, model)).scores()
        return self.task.predict(model, "dev").scores()

    def save(self, model: nn.Module, folder: Path) -> None:
        self.task.save(model, folder)


def _encoder(model: Any) -> Any:
    return model.encoder


def check_settings(settings: FinetuneSettings) -> None:
    """Raises UserError if an option has a value that no model and no text allows."""
    if settings.task not in TASKS:
        raise UserError(f"--task must be one of {', '.join(TASKS)}; got {settings.task!r}")
    if settings.label_separator == "":
        raise UserError("--label-separator must not be empty")
    for name, tasks in ONLY_FOR.items():
        if settings.task not in tasks and getattr(settings, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --task {', '.join(tasks)}; got --task {settings.task}")
    for name, low, high in (
        ("lr", 0.0, 1.0),
        ("clip", 0.0, 1e9),
        ("layer_decay", 0.0, 1.0),
        ("temperature", 0.0, 1e3),
    ):
        if not low < getattr(settings, name) <= high:
            given = getattr(settings, name)
            raise UserError(f"--{name.replace('_', '-')} must be above {low:g} and at most {high:g}; got {given}")
    for name in ("warmup", "weight_decay"):
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"--{name.replace('_', '-')} must be from 0 to below 1; got {getattr(settings, name)}")
    if settings.epochs > MOST_EPOCHS:
        raise UserError(f"--epochs must be from 1 to {MOST_EPOCHS:,}; got {settings.epochs:,}")
    if settings.seed + settings.seeds > 1 << 32:
        raise UserError(f"--seed must be below 2³²; got {settings.seed}")


def prepare_job(settings: FinetuneSettings, machine: Machine, folder: EncoderFolder) -> Job:
    """Reads and encodes the texts and their labels.

    Raises:
        UserError: an option does not fit the model or the labels, or a row cannot be used.
    """
    layers = folder.config.num_hidden_layers
    if settings.freeze_layers > layers:
        raise UserError(f"--freeze-layers must be from 0 to {layers}, the model's layers; got {settings.freeze_layers}")
    return Job(settings, machine, folder, TASKS[settings.task](settings, machine, folder))
