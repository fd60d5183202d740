"""Packed batches from worker processes, in one order however many there are, from any point on; and held-out ones.

The order is the run's, whoever reads it. Several processes that train together each take their share of it:

    lanes    L chunks are read side by side, a batch from each in turn: batch g comes from a chunk of lane g mod L
    ranks    rank r of R takes the batches g ≡ r (mod R): those of L / R lanes where R divides L, whose chunks nobody
             else makes; where it does not, some chunks are made by more than one rank, and the order is still the same

A chunk crosses from its worker as two arrays through a pipe. As tensors its batches would each take a handful of file
descriptors and their place in /dev/shm, which containers keep small; the pipe needs neither, and at a million tokens
a second carries 24 MB/s.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...model.batch import PackedBatch
from ..corpus.reader import Corpus
from ..text.workers import follow_parent
from .pack import BatchMaker, BatchShape, PackedExamples

_TENSORS = ("input_ids", "token_type_ids", "position_ids", "masked_positions", "masked_labels", "nsp_labels")
_COUNTS = ("max_seqlen", "num_tokens", "num_masked", "num_pairs")


@dataclasses.dataclass
class _Chunk:
    """The K batches of a chunk as two arrays; the name pin_memory is the one that DataLoader looks for."""

    int64: np.ndarray | Tensor  # (K, 3T + 2M + S + 4)
    int32: np.ndarray | Tensor  # (K, S + 1): cu_seqlens
    sizes: tuple[int, ...]  # of the fields in a row of int64

    @classmethod
    def collate(cls, batches: list[PackedBatch]) -> _Chunk:
        rows = [
            np.concatenate([*(getattr(b, n).numpy() for n in _TENSORS), [getattr(b, n) for n in _COUNTS]])
            for b in batches
        ]
        sizes = tuple(len(getattr(batches[0], n)) for n in _TENSORS)
        return cls(np.stack(rows), np.stack([b.cu_seqlens.numpy() for b in batches]), (*sizes, len(_COUNTS)))

    def pin_memory(self) -> _Chunk:
        int64, int32 = (torch.as_tensor(x).pin_memory() for x in (self.int64, self.int32))
        return _Chunk(int64, int32, self.sizes)

    def batches(self) -> Iterator[PackedBatch]:
        for row, cu_seqlens in zip(torch.as_tensor(self.int64), torch.as_tensor(self.int32), strict=True):
            *tensors, counts = row.split(self.sizes)
            yield PackedBatch(
                cu_seqlens=cu_seqlens,
                **dict(zip(_TENSORS, tensors, strict=True)),
                **dict(zip(_COUNTS, counts.tolist(), strict=True)),
            )


def _start_worker(worker: int) -> None:
    # Ctrl-C and torchrun's SIGTERM reach the whole process group; the training process saves, then ends its workers.
    follow_parent(signal.SIGINT, signal.SIGTERM)


def batches(
    examples: PackedExamples,
    *,
    num_workers: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    lanes: int = 1,
    pin_memory: bool = False,
) -> Iterator[PackedBatch]:
    """The batches of ``examples`` that are this rank's, without end.

    The sequence is the same whatever ``num_workers``. Taken together, in turn, the ranks' sequences are the same
    whatever ``world_size``, and with ``start`` = n they go on exactly where a run stopped that had taken n batches in
    all, on however many ranks.

    Args:
        examples: where they come from.
        num_workers: processes that make chunks ahead of use; 0 makes them here.
        start: batches to leave out, those of all ranks counted.
        rank, world_size: which of how many processes this one is.
        lanes: chunks read side by side; part of the order. A multiple of ``world_size`` shares the work best.
        pin_memory: give tensors in page-locked memory, when there is a CUDA device.

    Raises:
        ValueError: an argument is negative, rank is not below world_size, or lanes is 0. An error in a worker is
            raised here, with its traceback.
    """
    for name, value, least in (("num_workers", num_workers, 0), ("start", start, 0), ("lanes", lanes, 1)):
        if value < least:
            raise ValueError(f"{name} must not be {'negative' if least == 0 else 'less than 1'}; got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}); got {rank}")
    first = start + rank
    block = first // (lanes * examples.batches_per_chunk)
    mine = [lane for lane in range(lanes) if (lane - first) % math.gcd(world_size, lanes) == 0]
    chunks: Iterable[_Chunk] = DataLoader(
        examples,
        batch_size=None,  # an item is a chunk
        sampler=(lanes * b + lane for b in itertools.count(block) for lane in mine),  # type: ignore[arg-type]
        collate_fn=_Chunk.collate,
        num_workers=num_workers,
        # All lanes come to the ends of their chunks together, and the next ones should be there.
        prefetch_factor=max(2, -(-len(mine) // num_workers)) if num_workers else None,
        generator=torch.Generator(),  # DataLoader draws from it at the start: not from the one that dropout uses
        worker_init_fn=_start_worker,
        pin_memory=pin_memory and torch.cuda.is_available(),
    )
    return _take(iter(chunks), block, itertools.count(first, world_size), mine, lanes, examples.batches_per_chunk)


def _take(
    chunks: Iterator[_Chunk], block: int, numbers: Iterable[int], mine: list[int], lanes: int, per_chunk: int
) -> Iterator[PackedBatch]:
    """The batches of the given ``numbers``; ``chunks`` are those of the lanes ``mine``, from ``block`` on."""
    held: dict[int, list[PackedBatch]] = {}
    for number in numbers:
        wanted, place = divmod(number, lanes * per_chunk)
        while not held or block < wanted:
            block += bool(held)
            held = {lane: list(next(chunks).batches()) for lane in mine}
        yield held[place % lanes][place // lanes]


def heldout_batches(
    corpus: Corpus,
    shape: BatchShape,
    *,
    tokens: int | None = None,
    split_name: str = "heldout",
    nsp: bool = True,
    mlm_probability: float = 0.15,
    whole_word: bool = False,
    seed: int = 0,
) -> list[PackedBatch]:
    """A fixed list of batches to evaluate on: the same ones, under the same masks, each time.

    Every example is in them once, so the last batch has more slack. Where the split is a single document, or its
    sentences are too few to be matched, pairs stay without a label.

    Args:
        corpus, split_name, shape, nsp, mlm_probability, whole_word: as in `PackedExamples`.
        tokens: about how much of the split, in tokens of text, drawn at random; None: all of it.
        seed: decides the choice, pairs and masks.

    Raises:
        ValueError: an argument is not allowed, or the split is empty.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be positive; got {tokens}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    maker = BatchMaker(corpus, split_name, shape, nsp=nsp, mlm_probability=mlm_probability, whole_word=whole_word)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(maker.passages))
    if tokens is not None:
        order = order[: 1 + int(np.searchsorted(np.cumsum(maker.passages.tokens[order], dtype=np.int64), tokens))]
    examples = maker.examples(order, rng)
    return maker.batches(examples, maker.pack(examples, rng.permutation(len(examples))), rng)


__all__ = ["batches", "heldout_batches"]
