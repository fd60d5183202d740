"""Labelled texts in memory, and the batches of an epoch: an order that the seed fixes, packed without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...model.text_batch import TextBatch
from ..errors import UserError
from .embed import blocks
from .packing import pack_texts
from .rows import Columns, Row, read_rows
from .task import TrainingTexts
from .tokens import EncodedText, TextTokenizer


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    Attributes:
        texts: encoded, n of them.
        labels: as `Labels.encode` gives them, [n] or [n, C].
    """

    texts: list[EncodedText]
    labels: Tensor

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [n]."""
        return lengths_of(self.texts)

    def pack(self, chosen: np.ndarray, **shape: int) -> TextBatch:
        """See `TrainingTexts`."""
        return pack_texts([self.texts[i] for i in chosen], self.labels[torch.from_numpy(chosen)], **shape)


def lengths_of(texts: Sequence[EncodedText]) -> np.ndarray:
    """Tokens of each text, int64 [n]."""
    return np.array([len(text) for text in texts], dtype=np.int64)


def read_all(files: Iterable[str], columns: Columns, option: str) -> list[Row]:
    """The rows of all files, in memory.

    Raises:
        UserError: as `read_rows`, or there are none; ``option`` names them.
    """
    rows = [row for file in files for row in read_rows(file, columns)]
    if not rows:
        raise UserError(f"{option} {' '.join(files)} has no rows")
    return rows


def encode_rows(tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[EncodedText]:
    """The texts or pairs of ``rows``, encoded in bounded memory besides the result."""
    encoded: list[EncodedText] = []
    with tqdm(total=len(rows), unit=" texts", desc="tokens", dynamic_ncols=True, disable=None, leave=False) as bar:
        for block in blocks(rows):
            encoded += tokenizer([row.text for row in block], pairs_of(block))
            bar.update(len(block))
    return encoded


def pairs_of(rows: Sequence[Row]) -> list[str] | None:
    """The second texts of ``rows``; None if these are no pairs."""
    pairs = [row.pair for row in rows if row.pair is not None]
    return pairs if len(pairs) == len(rows) else None


class EpochBatches:
    """The steps of a run: ``batch_size`` texts each, in a new order in each epoch, the last step of an epoch smaller.

    Args:
        batch_size: texts of a step.
        tokens_per_batch: the most tokens of a micro-batch; a longer text is a micro-batch of its own.
        seed: of the order.
        epochs: number of epochs.
        static: all micro-batches have one shape, that of the largest; their last tokens are slack.

    Attributes:
        steps: of an epoch.
    """

    def __init__(
        self, examples: TrainingTexts, batch_size: int, tokens_per_batch: int, seed: int, epochs: int, static: bool
    ) -> None:
        self._examples, self._size, self._budget, self._seed = examples, batch_size, tokens_per_batch, seed
        self._lengths = examples.lengths
        self.steps = -(-len(self._lengths) // batch_size)
        self._shape: dict[str, int] = {}
        if static:
            totals = [
                int(self._lengths[each].sum())
                for epoch in range(epochs)
                for step in range(self.steps)
                for each in self._micro_batches(self._order(epoch), step)
            ]
            tokens, longest = -(-max(totals) // 64) * 64, int(self._lengths.max())
            segments = min(batch_size, len(self._lengths)) + -(-tokens // longest)
            self._shape = {"tokens": tokens, "segments": segments, "max_seqlen": longest}

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))

    def _micro_batches(self, order: np.ndarray, step: int) -> Iterator[np.ndarray]:
        chosen = order[step * self._size : (step + 1) * self._size]
        ends = np.cumsum(self._lengths[chosen])
        start = 0
        while start < len(chosen):
            before = ends[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(ends, before + self._budget, side="right")))
            yield chosen[start:end]
            start = end

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[TextBatch]]:
        """The micro-batches of each step of ``epoch``, from step ``start`` on."""
        order = self._order(epoch)
        for step in range(start, self.steps):
            yield [self._examples.pack(chosen, **self._shape) for chosen in self._micro_batches(order, step)]
