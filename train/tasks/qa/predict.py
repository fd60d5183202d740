"""``fusebert predict`` with a model that answers questions: the answer, its place, and the score of no answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ....model.hf.encoders import EncoderFolder
from ...errors import UserError
from ..embed import blocks
from ..models import Machine
from ..settings import PredictSettings
from .answers import best_answers
from .model import make_span_predictor, score_windows
from .questions import read_questions
from .windows import QuestionTokenizer


class AnswerPredictor:
    """A model that answers questions: questions → records.

    Attributes:
        notes: what to tell the user about the weights.

    Raises:
        UserError, ValueError: the model or an option cannot be used.
    """

    def __init__(self, settings: PredictSettings, machine: Machine, folder: EncoderFolder) -> None:
        for name in ("text", "text_pair"):
            if getattr(settings, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is not for {settings.model}, which reads question and context")
        self._settings, self._machine = settings, machine
        self._tokenizer = QuestionTokenizer(folder, settings.seqlen, settings.stride)
        model, self.notes = make_span_predictor(folder, trained=True)
        self._model = model.to(machine.device)

    def records(self) -> Iterator[dict[str, Any]]:
        """One record a question of ``settings.input``, in its order.

        Raises:
            UserError: a question cannot be used.
        """
        settings, threshold = self._settings, self._model.null_threshold
        with tqdm(unit=" questions", dynamic_ncols=True, disable=None) as bar:
            for block in blocks(read_questions(settings.input, answered=False)):
                windows = self._tokenizer(block)
                logits, _ = score_windows(self._model, windows, self._machine)
                for question, best in zip(
                    block, best_answers(block, windows, logits, settings.max_answer_tokens), strict=True
                ):
                    none = best.null_margin > threshold or not best.text
                    yield {
                        "id": question.id,
                        "answer": "" if none else best.text,
                        "score": best.score if best.text else None,
                        "start": None if none else best.start,
                        "end": None if none else best.end,
                        "null_score": best.null_score,
                    }
                bar.update(len(block))

    def warnings(self) -> list[str]:
        """None: no text is cut."""
        return []
