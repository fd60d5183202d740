"""Streams of packed batches from worker processes.

The order of the stream does not depend on the number of workers or ranks, and a stream can start at any batch:

    lanes    L chunks are read in parallel, a batch from each in turn: batch g is from a chunk of lane g mod L
    ranks    rank r of R takes the batches g ≡ r (mod R). If R divides L, they come from L / R lanes, and no other rank
             makes the chunks of these lanes. If not, several ranks make some of the chunks; the order is the same.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import math
import multiprocessing
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...model.batch import PackedBatch
from ..errors import UserError
from ..text.workers import follow_parent
from .dataset import PackedExamples

_TENSORS = ("input_ids", "token_type_ids", "position_ids", "masked_positions", "masked_labels", "nsp_labels")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_COUNTS = ("max_seqlen", "num_tokens", "num_masked", "num_pairs")


@dataclasses.dataclass
class _Chunk:
    """The K batches of a chunk as two arrays, which pass from the worker through a pipe.

    Sent as tensors, each batch would take file descriptors and space in /dev/shm, which is small in containers. The
    pipe carries 24 MB/s at a million tokens a second.
    """

    int64: np.ndarray | Tensor  # [K, 3T + 2M + S + 4]
    int32: np.ndarray | Tensor  # [K, S + 1]: cu_seqlens
    sizes: tuple[int, ...]  # of the fields in a row of int64

    @classmethod
    def collate(cls, batches: list[PackedBatch]) -> _Chunk:
        rows = [
            np.concatenate([*(getattr(b, n).numpy() for n in _TENSORS), [getattr(b, n) for n in _COUNTS]])
            for b in batches
        ]
        sizes = tuple(len(getattr(batches[0], n)) for n in _TENSORS)
        return cls(np.stack(rows), np.stack([b.cu_seqlens.numpy() for b in batches]), (*sizes, len(_COUNTS)))

    def pin_memory(self) -> _Chunk:  # DataLoader(pin_memory=True) calls a method of this name
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


class LostWorker(UserError):
    """A process that makes batches has died. The message is one line."""


class _WorkerDeaths:
    """Raises DataLoader's error about a dead worker while the training process waits for a batch, and only then.

    DataLoader raises it in a handler of SIGCHLD, at any point of the program: in the middle of an optimiser step, after
    which nothing could be saved.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._raise: Any = None

    def take_over(self) -> None:
        """Call it after DataLoader has installed its handler."""
        handler = signal.getsignal(signal.SIGCHLD)
        if handler != self._note and callable(handler) and threading.current_thread() is threading.main_thread():
            self._raise = handler
            signal.signal(signal.SIGCHLD, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._raise(number, frame)

    def next(self, chunks: Iterator[_Chunk]) -> _Chunk:
        self._waiting = self._raise is not None
        try:
            self._note(signal.SIGCHLD, None)  # for a worker that died before
            return next(chunks)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            reason = str(error).splitlines()[0].strip(" .")
            raise LostWorker(
                f"a process that makes batches has died ({reason}), perhaps because memory ran out: fewer --workers "
                "need less"
            ) from error
        finally:
            self._waiting = False


_deaths = _WorkerDeaths()


def _start_worker(worker: int) -> None:
    # Ctrl-C and a batch system's signals reach the whole process group; the training process saves, then ends its
    # workers.
    follow_parent(*STOP_SIGNALS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _kill_workers() -> None:
    # At exit multiprocessing sends SIGTERM to the workers, which they ignore, and waits for them for ever.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises when a worker dies
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def batches(
    examples: PackedExamples,
    *,
    num_workers: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    lanes: int = 1,
    pin_memory: bool = False,
) -> Generator[PackedBatch, None, None]:
    """This rank's batches of ``examples``, without end.

    The sequence does not depend on ``num_workers``. The ranks' sequences, interleaved, do not depend on ``world_size``;
    with ``start`` = n they continue a run that stopped after n batches in all, on any number of ranks.

    Args:
        examples: the chunks of batches.
        num_workers: processes that make chunks in advance; 0 makes them in this process.
        start: batches to skip, counted over all ranks.
        rank: number of this process.
        world_size: number of processes.
        lanes: chunks read in parallel; part of the order. A multiple of ``world_size`` divides the work best.
        pin_memory: return tensors in page-locked memory, if there is a CUDA device.

    Raises:
        ValueError: an argument is out of range. An error in a worker is raised here, with its traceback.
        LostWorker: by the iterator, a worker died.
    """
    for name, value, least in (("num_workers", num_workers, 0), ("start", start, 0), ("lanes", lanes, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}); got {rank}")
    if num_workers:
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)
    first = start + rank
    block = first // (lanes * examples.batches_per_chunk)
    my_lanes = [lane for lane in range(lanes) if (lane - first) % math.gcd(world_size, lanes) == 0]
    chunks: Iterable[_Chunk] = DataLoader(
        examples,
        batch_size=None,  # an item is a chunk
        sampler=(lanes * b + lane for b in itertools.count(block) for lane in my_lanes),  # type: ignore[arg-type]
        collate_fn=_Chunk.collate,
        num_workers=num_workers,
        # All lanes reach the ends of their chunks together, so their next chunks must be ready by then.
        prefetch_factor=max(2, -(-len(my_lanes) // num_workers)) if num_workers else None,
        generator=torch.Generator(),  # else DataLoader draws from torch's generator, which dropout uses
        worker_init_fn=_start_worker,
        pin_memory=pin_memory and torch.cuda.is_available(),
    )
    # Signals wait until the workers ignore them. One that arrives during a fork could end a worker, or be lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        stream = iter(chunks)
        if num_workers:
            _deaths.take_over()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _take(stream, block, itertools.count(first, world_size), my_lanes, lanes, examples.batches_per_chunk)


def _take(
    chunks: Iterator[_Chunk], block: int, numbers: Iterable[int], my_lanes: list[int], lanes: int, per_chunk: int
) -> Generator[PackedBatch, None, None]:
    """The batches with the given ``numbers``; ``chunks`` are those of ``my_lanes``, from ``block`` on."""
    held: dict[int, list[PackedBatch]] = {}
    for number in numbers:
        wanted, place = divmod(number, lanes * per_chunk)
        while not held or block < wanted:
            block += bool(held)
            held = {lane: list(_deaths.next(chunks).batches()) for lane in my_lanes}
        yield held[place % lanes][place // lanes]
