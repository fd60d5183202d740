"""A batch at a fixed address, for CUDA graphs, and asynchronous copies of host batches into it.

A host batch is copied from pinned memory to one of two slots on the device, on a stream of its own, while the previous
batch is computed. The compute stream waits for that copy and moves the slot to the static batch (24 bytes a token:
microseconds). The host does not wait.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...model.batch import Batch

SLOTS = 2
UNKNOWN = -1  # the counts differ from step to step, so a captured function must not use them


def _tensors(batch: Batch) -> list[Tensor]:
    values = (getattr(batch, field.name) for field in dataclasses.fields(batch))  # type: ignore[arg-type]
    return [value for value in values if isinstance(value, Tensor)]


class StaticBatch:
    """One batch on ``device`` with content that is replaced in place.

    Args:
        like: a batch of the run. All batches have its shapes and its ``max_seqlen``.

    Attributes:
        batch: the batch; its counts (``num_tokens`` and the like) are −1.
        device: where it is.
    """

    def __init__(self, like: Batch, device: torch.device) -> None:
        def empty() -> Any:
            return like.map(lambda x: torch.empty_like(x, device=device, pin_memory=False))

        counts = [each.name for each in dataclasses.fields(like) if each.name.startswith("num_")]  # type: ignore[arg-type]
        self.batch = dataclasses.replace(empty(), **dict.fromkeys(counts, UNKNOWN))
        self.device = device
        self._loads = 0
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._slots = [empty() for _ in range(SLOTS)]
            self._stream = torch.cuda.Stream(device)
            # For each slot: the host batch is in it; its content has been moved to the static batch.
            self._filled, self._emptied = ([torch.cuda.Event() for _ in range(SLOTS)] for _ in range(2))

    def load(self, batch: Batch) -> Any:
        """Copies ``batch`` into ``self.batch``, in the order of the current stream, and returns ``self.batch``.

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
            self._stream.wait_event(self._emptied[i])
            for on_device, on_host in zip(slot, _tensors(batch), strict=True):
                on_device.copy_(on_host, non_blocking=True)
            self._filled[i].record(self._stream)
        compute.wait_event(self._filled[i])
        torch._foreach_copy_(_tensors(self.batch), slot)
        self._emptied[i].record(compute)
        return self.batch

    def _check(self, batch: Batch) -> None:
        for field in dataclasses.fields(batch):  # type: ignore[arg-type]
            static, given = getattr(self.batch, field.name), getattr(batch, field.name)
            if isinstance(given, Tensor) and given.shape != static.shape:
                raise ValueError(
                    f"all batches of a captured step must have one shape: {field.name} has shape {tuple(given.shape)}, "
                    f"in the first batch {tuple(static.shape)}"
                )
        if batch.max_seqlen != self.batch.max_seqlen:
            raise ValueError(
                f"all batches of a captured step must have one max_seqlen: got {batch.max_seqlen}, in the first batch "
                f"{self.batch.max_seqlen}"
            )
