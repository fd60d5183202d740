"""``fusebert predict`` with a model that answers questions: the answer, its place, and the score of no answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ....model.hf.encoders import EncoderFolder
from ....model.hf.save_classifier import reading_of
from ...errors import UserError
from ..embed import blocks
from ..models import Machine
from ..settings import MAX_ANSWER_TOKENS, PredictSettings
from .answers import N_BEST, NEVER, Answer, best_answers
from .model import make_span_predictor, score_windows
from .questions import Question, read_questions
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
        self._tokenizer = QuestionTokenizer(
            folder, settings.seqlen, reading_of(folder, "stride") if settings.stride is None else settings.stride
        )
        if settings.n_best is not None and settings.n_best > N_BEST:
            raise UserError(f"--n-best must be from 1 to {N_BEST}; got {settings.n_best}")
        stated = reading_of(folder, "max_answer_tokens") or MAX_ANSWER_TOKENS
        self._longest = stated if settings.max_answer_tokens is None else settings.max_answer_tokens
        model, self.notes = make_span_predictor(folder, trained=True)
        self._model = model.to(machine.device)

    def records(self) -> Iterator[dict[str, Any]]:
        """One record a question of ``settings.input``, in its order.

        Raises:
            UserError: a question cannot be used.
        """
        settings = self._settings
        with tqdm(unit=" questions", dynamic_ncols=True, disable=None) as bar:
            for block in blocks(read_questions(settings.input, answered=False)):
                windows = self._tokenizer(block)
                logits, _ = score_windows(self._model, windows, self._machine)
                count = 1 if settings.n_best is None else N_BEST  # of which probabilities are shares
                found = best_answers(block, windows, logits, self._longest, count)
                yield from (self._record(question, each) for question, each in zip(block, found, strict=True))
                bar.update(len(block))

    def _record(self, question: Question, found: Answer) -> dict[str, Any]:
        threshold, n_best = self._model.null_threshold, self._settings.n_best
        none = found.null_margin > threshold or not found.spans
        record: dict[str, Any] = {
            "id": question.id,
            "answer": "" if none else found.text,
            "score": found.spans[0].score if found.spans else None,
            "start": None if none else found.spans[0].start,
            "end": None if none else found.spans[0].end,
            "null_score": found.null_score,
        }
        if n_best is not None:
            *shares, null = found.probabilities(with_null=threshold < NEVER).tolist()
            record["null_probability"] = null
            record["n_best"] = [
                {"answer": span.text, "score": span.score, "start": span.start, "end": span.end, "probability": share}
                for span, share in zip(found.spans[:n_best], shares, strict=False)
            ]
        return record

    def warnings(self) -> list[str]:
        """None: no text is cut."""
        return []
