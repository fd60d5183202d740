"""The task "qa": the span of a text that answers a question, or none (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ....model.heads import SpanPredictor
from ....model.hf.encoders import EncoderFolder
from ....model.hf.save_classifier import copied_tokenizer, save_span_predictor
from ...errors import UserError
from ..examples import Examples
from ..models import Machine
from ..say import say
from ..scores import choose_metric
from ..settings import FinetuneSettings
from .answers import NEVER, best_answers, exact_and_f1
from .model import make_span_predictor, score_windows
from .questions import Question, read_questions
from .report import METRICS, AnswerPredictions
from .windows import QuestionTokenizer, Window, labels_of

Split = tuple[list[Question], list[Window]]


@dataclasses.dataclass(frozen=True)
class AnswerTask:
    """See `task.Task`.

    Attributes:
        folder: of the model to start from.
        tokenizer: files of `copied_tokenizer`.
        num_questions: of the training files.
        all_answered: every training and dev question has an answer, as in SQuAD 1.1.
        longest: the most tokens of an answer.
        stride: tokens that windows share; None: the default.
        splits: questions and their windows, of "dev" and, if there are any, of "test".
    """

    machine: Machine
    folder: EncoderFolder
    tokenizer: dict[str, bytes]
    num_questions: int
    all_answered: bool
    longest: int
    stride: int | None
    train: Examples
    splits: dict[str, Split]
    metric: str

    @property
    def title(self) -> str:
        """See `task.Task`."""
        return f"qa, {self.num_questions:,} training questions, {len(self.splits['dev'][0]):,} dev questions"

    def make_model(self, folder: EncoderFolder, trained: bool = False) -> tuple[SpanPredictor, list[str]]:
        """See `task.Task`."""
        return make_span_predictor(folder, trained)

    def predict(self, model: SpanPredictor, split: str) -> AnswerPredictions:
        """See `task.Task`. ``model.null_threshold`` decides what is answered."""
        return self._found(model, split).with_threshold(model.null_threshold)

    def choose_threshold(self, model: SpanPredictor) -> AnswerPredictions:
        """Sets ``model.null_threshold`` to that of the best F1 on the dev questions; their predictions with it."""
        found = self._found(model, "dev")
        model.null_threshold = NEVER if self.all_answered else found.best_threshold()
        return found.with_threshold(model.null_threshold)

    def _found(self, model: SpanPredictor, split: str) -> AnswerPredictions:
        questions, windows = self.splits[split]
        logits, loss = score_windows(model, windows, self.machine, labels_of(windows, questions))
        answers = best_answers(questions, windows, logits, self.longest)
        with_answer, without = (
            np.array([exact_and_f1(text, each) for text, each in zip(texts, questions, strict=True)])
            for texts in ([each.text for each in answers], [""] * len(answers))
        )
        return AnswerPredictions(questions, answers, with_answer, without, loss / len(windows))

    def save(self, model: SpanPredictor, directory: Path) -> None:
        """See `task.Task`."""
        options = {"max_answer_tokens": self.longest, "stride": self.stride}
        save_span_predictor(model, directory, self.folder, self.tokenizer, options)


def read_answer_task(settings: FinetuneSettings, machine: Machine, folder: EncoderFolder) -> AnswerTask:
    """Reads and encodes the questions, the texts and the answers.

    Raises:
        UserError: an option does not fit, or a question cannot be used.
    """
    metric = choose_metric(settings.metric, METRICS)
    try:
        import torchmetrics  # noqa: F401 (better now than after the first epoch)
    except ModuleNotFoundError as error:
        raise UserError("--task qa needs torchmetrics for its metrics: pip install 'fusebert[tasks]'") from error
    train, dev = _read(settings.train, "--train"), _read([settings.dev], "--dev")
    test = None if settings.test is None else _read([settings.test], "--test")
    tokenizer = QuestionTokenizer(folder, settings.seqlen, settings.stride)
    windows = tokenizer(train)
    task = AnswerTask(
        machine=machine,
        folder=folder,
        tokenizer=copied_tokenizer(folder.directory, tokenizer.seqlen),
        num_questions=len(train),
        all_answered=all(each.answers for each in [*train, *dev]),
        longest=settings.max_answer_tokens,
        stride=settings.stride,
        train=Examples([window.text for window in windows], labels_of(windows, train)),
        splits={
            name: (questions, tokenizer(questions))
            for name, questions in (("dev", dev), ("test", test))
            if questions is not None
        },
        metric=metric,
    )
    say(
        f"{len(train):,} training questions in {len(windows):,} windows, {len(dev):,} dev questions; a window has up "
        f"to {tokenizer.seqlen} tokens"
    )
    known = {(each.question, each.context) for each in train}
    for name, questions in (("dev", dev), ("test", test or [])):
        if seen := sum((each.question, each.context) in known for each in questions):
            say(
                f"warning: {seen:,} of {len(questions):,} {name} questions are training questions too: the scores are "
                "too good"
            )
    return task


def _read(files: Sequence[str], option: str) -> list[Question]:
    questions = [question for file in files for question in read_questions(file, answered=True)]
    if not questions:
        raise UserError(f"{option} {' '.join(files)} has no questions")
    return questions
