"""Batches at one address: what a captured step reads, and how host batches get there while the step before computes.

A host batch goes to one of two slots on a stream of its own, from pinned memory, as soon as the batch before last has
left it; the compute stream waits for that copy alone and moves the slot to the static batch, on the device (24 bytes a
token: microseconds). The host waits for nothing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...model.batch import PackedBatch

SLOTS = 2
UNKNOWN = -1  # the host's counts are another batch's at each step: nothing captured may have used them


def _tensors(batch: PackedBatch) -> list[Tensor]:
    values = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return [value for value in values if isinstance(value, Tensor)]


class StaticBatch:
    """One batch on ``device`` whose content is replaced, never its memory.

    Args:
        like: a batch of the run; all of them have its shapes and its ``max_seqlen``.

    Attributes:
        batch: its counts (``num_tokens`` and the like) are −1.
    """

    def __init__(self, like: PackedBatch, device: torch.device) -> None:
        def empty() -> PackedBatch:
            return like.map(lambda x: torch.empty_like(x, device=device, pin_memory=False))

        self.batch = dataclasses.replace(empty(), num_tokens=UNKNOWN, num_masked=UNKNOWN, num_pairs=UNKNOWN)
        self._loads = 0
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._slots = [empty() for _ in range(SLOTS)]
            self._stream = torch.cuda.Stream(device)
            self._arrived, self._left = ([torch.cuda.Event() for _ in range(SLOTS)] for _ in range(2))

    def load(self, batch: PackedBatch) -> PackedBatch:
        """``self.batch``, which holds ``batch`` when the current stream gets there.

        Raises:
            ValueError: ``batch`` has another shape or ``max_seqlen``.
        """
        self._check(batch)
        if not self._on_gpu or batch.input_ids.is_cuda:
            torch._foreach_copy_(_tensors(self.batch), _tensors(batch))
            return self.batch
        i = self._loads % SLOTS
        self._loads += 1
        slot, compute = _tensors(self._slots[i]), torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left[i])
            for there, here in zip(slot, _tensors(batch), strict=True):
                there.copy_(here, non_blocking=True)
            self._arrived[i].record(self._stream)
        compute.wait_event(self._arrived[i])
        torch._foreach_copy_(_tensors(self.batch), slot)
        self._left[i].record(compute)
        return self.batch

    def _check(self, batch: PackedBatch) -> None:
        for field in dataclasses.fields(batch):
            ours, given = getattr(self.batch, field.name), getattr(batch, field.name)
            if isinstance(given, Tensor) and given.shape != ours.shape:
                raise ValueError(
                    f"the batches of a captured step have one shape: {field.name} has {tuple(given.shape)}, the first "
                    f"batch had {tuple(ours.shape)}"
                )
        if batch.max_seqlen != self.batch.max_seqlen:
            raise ValueError(
                f"the batches of a captured step have one max_seqlen: got {batch.max_seqlen}, the first batch had "
                f"{self.batch.max_seqlen}"
            )


__all__ = ["StaticBatch"]
