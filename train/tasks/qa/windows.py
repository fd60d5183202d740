"""A question and a part of its context: windows of tokens that overlap, so that no part of a context is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....model.hf.encoders import EncoderFolder
from ...errors import UserError
from ..embed import blocks
from ..tokens import EncodedText, TextTokenizer
from .questions import Question

OVERLAP = 128  # tokens, or half of what is left for the context if that is less


@dataclasses.dataclass(frozen=True)
class Window:
    """Question and part of the context.

    Attributes:
        text: the tokens.
        number: of the question.
        first: the place of the context's first token.
        offsets: int64 [n, 2], for each token of the context the characters that it is.
    """

    text: EncodedText
    number: int
    first: int
    offsets: np.ndarray

    def label(self, question: Question) -> tuple[int, int]:
        """The first and the last token of the first answer; the first token twice if it is not wholly in the window."""
        if not question.answers:
            return 0, 0
        text, start = question.answers[0]
        end = start + len(text)
        inside = np.flatnonzero((self.offsets[:, 0] < end) & (self.offsets[:, 1] > start))
        if not len(inside) or self.offsets[inside[0], 0] > start or self.offsets[inside[-1], 1] < end:
            return 0, 0
        return self.first + int(inside[0]), self.first + int(inside[-1])


class QuestionTokenizer:
    """The tokenizer of ``folder`` for questions and contexts.

    Args:
        seqlen: the most tokens of a window; None: what the folder says, or the model's positions.
        overlap: tokens of the context that a window shares with the one before; None: `OVERLAP`.

    Attributes:
        seqlen: the most tokens.

    Raises:
        UserError: as `TextTokenizer`.
    """

    def __init__(self, folder: EncoderFolder, seqlen: int | None = None, overlap: int | None = None) -> None:
        plain = TextTokenizer(folder, seqlen)
        self.seqlen, self._tokenizer, self._overlap = plain.seqlen, plain.tokenizer, overlap
        self._types = folder.family.token_types
        self._special = self._tokenizer.num_special_tokens_to_add(is_pair=True)

    def __call__(self, questions: Sequence[Question]) -> list[Window]:
        """The windows of all questions, in their order.

        Raises:
            UserError: a question is too long for a window, or the overlap for the context that is left in one.
        """
        windows: list[Window] = []
        for block in blocks(enumerate(questions)):
            overlaps = self._overlaps([question for _, question in block])
            encoded: dict[int, Any] = {}
            for overlap in np.unique(overlaps):  # the tokenizer has one overlap at a time
                chosen = np.flatnonzero(overlaps == overlap)
                self._tokenizer.enable_truncation(self.seqlen, stride=int(overlap), strategy="only_second")
                pairs: Any = [(block[i][1].question, block[i][1].context) for i in chosen]
                encoded |= dict(zip(chosen, self._tokenizer.encode_batch(pairs), strict=True))
            for i, (number, _) in enumerate(block):
                windows += [self._window(number, each) for each in (encoded[i], *encoded[i].overflowing)]
        return windows

    def _overlaps(self, questions: Sequence[Question]) -> np.ndarray:
        """Tokens that the windows of each question share, int64 [n]."""
        self._tokenizer.no_truncation()
        asked = self._tokenizer.encode_batch([each.question for each in questions], add_special_tokens=False)
        overlaps = []
        for question, own in zip(questions, asked, strict=True):
            room = self.seqlen - self._special - len(own.ids)
            overlap = min(OVERLAP, room // 2) if self._overlap is None else self._overlap
            if not 0 <= overlap < room:
                raise UserError(
                    f"{question.where}: the question has {len(own.ids)} tokens, which leaves {max(room, 0)} of a "
                    f"window for the context, and windows share {overlap}: raise --seqlen or lower --stride"
                )
            overlaps.append(overlap)
        return np.array(overlaps, dtype=np.int64)

    def _window(self, number: int, encoding: Any) -> Window:
        ids = np.array(encoding.ids, dtype=np.int64)
        types = np.array(encoding.type_ids, dtype=np.int64) if self._types else np.zeros_like(ids)
        sides = np.array([-1 if side is None else side for side in encoding.sequence_ids])
        of_context = np.flatnonzero(sides == 1)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[of_context]
        return Window(EncodedText(ids, types), number, int(of_context[0]) if len(of_context) else 0, offsets)


def labels_of(windows: Sequence[Window], questions: Sequence[Question]) -> Tensor:
    """int64 [n, 2], `Window.label` of each."""
    return torch.tensor([window.label(questions[window.number]) for window in windows], dtype=torch.int64).view(-1, 2)
