"""``fusebert predict``: what a fine-tuned model says of texts, by the task that its folder is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from ...model.hf.save_classifier import SPAN_PREDICTOR, TAGGER, is_for
from ..errors import UserError
from .models import choose_machine, open_folder
from .predict import LabelPredictor
from .qa.predict import AnswerPredictor
from .settings import PredictSettings
from .tag.predict import TagPredictor


class Predictor(Protocol):
    """A fine-tuned model: texts → records.

    Attributes:
        notes: what to tell the user about the weights.
    """

    notes: list[str]

    def records(self) -> Iterator[dict[str, Any]]:
        """One record a text of the input, in its order. Memory is bounded.

        Raises:
            UserError: a row cannot be used.
        """

    def warnings(self) -> list[str]:
        """What to tell the user about the texts."""


def open_predictor(settings: PredictSettings) -> Predictor:
    """The predictor for the folder ``settings.model``.

    Raises:
        UserError, ValueError: the model or an option cannot be used.
    """
    machine, folder = choose_machine(settings), open_folder(settings.model)
    if is_for(folder, SPAN_PREDICTOR):
        return AnswerPredictor(settings, machine, folder)
    for name in ("max_answer_tokens", "n_best"):
        if getattr(settings, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for a model that answers questions, not {settings.model}")
    return (TagPredictor if is_for(folder, TAGGER) else LabelPredictor)(settings, machine, folder)
