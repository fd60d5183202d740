"""What ``fusebert finetune`` needs of a task, so that all tasks share the steps, the run's folder and the report.

A task holds its texts and labels, makes and exports its model, and turns dev and test texts into `Predictions`.
`job.prepare_job` makes the task that ``--task`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import nn

from ...model.hf.encoders import EncoderFolder
from ...model.text_batch import TextBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TrainingTexts(Protocol):
    """Encoded texts with labels, which `examples.EpochBatches` packs."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [n]."""

    def pack(self, chosen: np.ndarray, **shape: int) -> TextBatch:
        """The texts ``chosen``, by number, as one batch of the ``shape`` that `packing.pack_texts` describes."""


class Predictions(Protocol):
    """A model's predictions for the dev or the test texts."""

    def scores(self) -> dict[str, float]:
        """The metrics by name, "loss" among them. NaN where one is not defined."""

    def per_class(self) -> list[dict[str, Any]]:
        """Figures of each class for report.json; empty if the task has no classes."""

    def sections(self) -> list[dict[str, Any]]:
        """Tables of report.html: title, header, rows."""

    def plots(self) -> Sequence[Callable[[Axes], None]]:
        """The plots of report.png besides the loss, each given axes to draw on."""


class Task(Protocol):
    """The data of a run, and what its labels mean."""

    @property
    def metric(self) -> str:
        """The name of the score that chooses the best model."""

    @property
    def train(self) -> TrainingTexts:
        """The training texts."""

    @property
    def splits(self) -> Mapping[str, Any]:
        """The texts that a model is scored on: "dev", and "test" if there are any."""

    @property
    def title(self) -> str:
        """The task and the numbers of its texts, for the report."""

    def make_model(self, folder: EncoderFolder, trained: bool = False) -> tuple[nn.Module, list[str]]:
        """A model with the folder's weights on the CPU, and what to tell the user about those that do not fit.

        Args:
            trained: the head must be in the folder; else it is drawn from torch's generator.

        Raises:
            UserError: a weight is not finite, or the head is missing.
        """

    def predict(self, model: Any, split: str) -> Predictions:
        """The predictions for the "dev" or the "test" texts. Leaves the model in evaluation mode."""

    def save(self, model: Any, directory: Path) -> None:
        """Writes a folder that the matching AutoModelFor… of Transformers loads."""
