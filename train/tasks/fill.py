"""``fusebert fill``: guesses for the mask tokens of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .embed import blocks
from .masked import MASK_TOKENS, MaskedModel
from .rows import Columns, Row, read_rows
from .settings import FillSettings

BLOCK = 256  # texts; their log probabilities are not kept


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text and the guesses for its masks.

    Attributes:
        text: as given.
        filled: the text with the likeliest token in each mask's place.
        masks: for each mask, in order, (token, probability), the likeliest first.
    """

    text: str
    filled: str
    masks: list[list[tuple[str, float]]]

    def to_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        guesses = [[{"token": token, "probability": p} for token, p in mask] for mask in self.masks]
        return {"text": self.text, "filled": self.filled, "masks": guesses}


def fill(settings: FillSettings) -> tuple[Iterator[Filled], MaskedModel]:
    """Runs ``fusebert fill``: the guesses for each text, in order, and the model.

    Raises:
        UserError, ValueError: an option, the model or a text cannot be used.
    """
    if (settings.sentence is None) == (settings.input is None):
        raise UserError("give one text, or a file of texts with --input: one of the two")
    if not 1 <= settings.top <= 1000:
        raise UserError(f"--top must be from 1 to 1000; got {settings.top}")
    model = MaskedModel(settings)
    if settings.input is not None:
        rows = read_rows(settings.input, Columns(text=settings.text))
    else:
        rows = iter([Row("the text", str(settings.sentence))])
    return (filled for block in blocks(rows, BLOCK) for filled in _fill(model, block, settings.top)), model


def _fill(model: MaskedModel, rows: Sequence[Row], top: int) -> list[Filled]:
    token, number = model.mask
    texts = []
    for row in rows:
        text = row.text
        for other in MASK_TOKENS:
            text = text.replace(other, token)
        texts.append(text)
    encoded = model.tokenizer(texts)
    positions = [np.flatnonzero(each.ids == number) for each in encoded]
    for row, text, found in zip(rows, texts, positions, strict=True):
        if token not in text:
            raise UserError(
                f"{row.where} has no {token}: {row.text[:60]!r}; write {token} where a word is to be guessed"
            )
        if len(found) < text.count(token):
            raise UserError(
                f"{row.where} has a {token} after the first {model.tokenizer.seqlen} tokens: shorten the text"
            )
    results: list[Filled | None] = [None] * len(rows)
    for i, log_probabilities in model.log_probabilities(encoded, positions):
        best = torch.topk(log_probabilities.exp(), min(top, log_probabilities.shape[-1]), dim=-1)
        masks = [
            [(model.tokenizer.tokenizer.decode([t]).strip(), p) for t, p in zip(tokens, values, strict=True)]
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        filled = texts[i]
        for guesses in masks:
            filled = filled.replace(token, guesses[0][0], 1)
        results[i] = Filled(rows[i].text, filled, masks)
    return [each for each in results if each is not None]
