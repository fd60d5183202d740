"""Packed batches of constant shape: an endless dataset of chunks to train on, and a fixed list to evaluate on.

An epoch shuffles the passages of a split and distributes them, by tokens, to chunks; a chunk becomes
`batches_per_chunk` batches. All random choices for chunk i are drawn from (seed, i), so any process can make any chunk
at any time. What a chunk's examples leave of its batches is filled with some of them again, under other masks (2 % and
the rounding to whole batches).
"""

from __future__ import annotations

import math

import numpy as np
from torch.utils.data import Dataset

from ...model.batch import PackedBatch
from .batch_maker import BatchMaker
from .pack import WINDOW, shuffled_queue

CHUNK_TOKENS = 1 << 18  # of packed batches: hundreds of examples to match and pack, a few MB in memory
CHUNK_BATCHES = (4, 32)  # fewest and most batches of a chunk
SPARE = 0.02  # extra batches in an epoch, so that a chunk with slightly more text loses none of it
_PASSAGE_ORDER, _CHUNK = 0, 1  # purposes of random streams


class PackedExamples(Dataset[list[PackedBatch]]):
    """Chunks of packed batches, without end: ``examples[i]`` is a list of ``batches_per_chunk`` batches.

    A chunk depends only on the arguments and i. Each passage is once in an epoch, or as often as its weight says.

    Args:
        maker: the text, the shape of the batches and the kind of examples.
        seed: not negative; decides order, pairs and masks.

    Attributes:
        batches_per_chunk: K, constant.
        chunks_per_epoch: an epoch has ``chunks_per_epoch * batches_per_chunk`` batches.

    Raises:
        ValueError: seed is negative, or the maker makes sentence pairs of a single document.
    """

    def __init__(self, maker: BatchMaker, *, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative; got {seed}")
        passages = maker.passages
        if maker.nsp and passages.num_documents < 2:
            raise ValueError(
                f"the split {maker.split_name!r} has one document, and next-sentence pairs need another for their "
                "wrong second sentences: prepare more documents, or turn pairs off (nsp=False, --no-nsp)"
            )
        self._maker = maker
        self._seed = seed

        # Among chunks of about CHUNK_TOKENS, choose those that round the batches of an epoch up by the least.
        needed = (1 + SPARE) * passages.tokens_of_epoch() / self._text_per_batch()
        least, most = CHUNK_BATCHES
        most = min(math.ceil(needed), max(least, min(most, CHUNK_TOKENS // maker.shape.tokens)))
        options = [(math.ceil(needed / k), k) for k in range((most + 1) // 2, most + 1)]
        self.chunks_per_epoch, self.batches_per_chunk = min(options, key=lambda option: (math.prod(option), option))
        if self.chunks_per_epoch > len(passages):  # a few very large batches, and hardly any text
            self.chunks_per_epoch = 1
            self.batches_per_chunk = math.ceil(needed)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, its passages, the bounds of its chunks

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which the whole split is read once."""
        return self.chunks_per_epoch * self.batches_per_chunk

    def _text_per_batch(self) -> float:
        """Tokens of text in a full batch (without special tokens and slack), measured on a sample."""
        rng = np.random.default_rng(0)
        passages, tokens = self._maker.passages, self._maker.shape.tokens
        sample = passages.sample(32 * tokens, rng)
        examples = self._maker.examples(sample, rng)
        lengths = examples.lengths
        packed = self._maker.pack(examples, shuffled_queue(lengths, 24 * tokens, rng), 16)
        per_batch = np.mean([lengths[chosen].sum() for chosen in packed])
        return float(per_batch * passages.tokens[sample].sum() / lengths.sum())

    def _chunk_passages(self, chunk: int) -> np.ndarray:
        """The numbers of a chunk's passages."""
        count = self.chunks_per_epoch
        epoch, number = divmod(chunk, count)
        if self._order is None or self._order[0] != epoch:
            tokens = self._maker.passages.tokens
            order = self._maker.passages.draw(np.random.default_rng((self._seed, _PASSAGE_ORDER, epoch)))
            # Equal shares of the tokens, cut at the nearest passage, with at least one passage in each.
            middle = np.cumsum(tokens[order], dtype=np.int64) - tokens[order] / 2
            bounds = np.searchsorted(middle, np.arange(count + 1) * (tokens[order].sum(dtype=np.int64) / count))
            bounds[0], bounds[-1] = 0, len(order)
            ahead = np.arange(count + 1)
            bounds = np.minimum(np.maximum.accumulate(bounds - ahead) + ahead, len(order) - ahead[::-1])
            self._order = (epoch, order, bounds)
        _, order, bounds = self._order
        return order[bounds[number] : bounds[number + 1]]

    def __getitem__(self, index: int) -> list[PackedBatch]:
        if index < 0:
            raise IndexError(f"chunks are numbered from 0; got {index}")
        rng = np.random.default_rng((self._seed, _CHUNK, index))
        examples = self._maker.examples(self._chunk_passages(index), rng)
        shape = self._maker.shape
        enough = (self.batches_per_chunk + 2) * shape.tokens + WINDOW * shape.seqlen
        packed = self._maker.pack(examples, shuffled_queue(examples.lengths, enough, rng), self.batches_per_chunk)
        return self._maker.batches(examples, packed, rng)


def heldout_batches(maker: BatchMaker, *, tokens: int | None = None, seed: int = 0) -> list[PackedBatch]:
    """A fixed list of batches to evaluate on: the same batches with the same masks at each call.

    Each example is in the list once, so the last batch has more slack. Pairs stay without labels where the split is a
    single document, or has too few sentences to match them.

    Args:
        maker: the text, the shape of the batches and the kind of examples.
        tokens: about how many tokens of text, drawn at random; None: the whole split.
        seed: decides the choice, pairs and masks.

    Raises:
        ValueError: tokens is not positive, or seed is negative.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be positive; got {tokens}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(maker.passages))
    if tokens is not None:
        order = order[: 1 + int(np.searchsorted(np.cumsum(maker.passages.tokens[order], dtype=np.int64), tokens))]
    examples = maker.examples(order, rng)
    return maker.batches(examples, maker.pack(examples, rng.permutation(len(examples))), rng)
