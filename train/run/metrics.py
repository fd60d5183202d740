"""The numbers of a log line: sums over steps and ranks, read from the device without a wait."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.batch import PackedBatch
from ...model.config import BertConfig
from ..step.distributed import Ranks
from ..step.flops import batch_flops
from ..step.step import StepResult
from ..step.stopwatch import Stopwatch


class Counts(NamedTuple):
    """Contents of the micro-batches of a step: real tokens, FLOPs, masked tokens, labelled pairs."""

    tokens: int
    flops: int
    num_masked: int
    num_pairs: int

    @classmethod
    def of(cls, config: BertConfig, window: Sequence[PackedBatch]) -> Counts:
        """Counts of ``window``, which is on the CPU."""
        return cls(
            sum(batch.num_tokens for batch in window),
            sum(batch_flops(config, batch) for batch in window),
            sum(batch.num_masked for batch in window),
            sum(batch.num_pairs for batch in window),
        )


class Readback:
    """An asynchronous copy of ``values`` (1-D) from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether `values` returns without waiting."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The values. Waits for the device if necessary."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Interval:
    """The steps of one log line: sums on the device, which `close` starts to copy to the host.

    Attributes:
        steps, tokens, flops: totals of the steps, over all ranks.
        step, tokens_seen, lr: of the run at the last step; set by `close`.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = self.tokens = self.flops = 0
        self.step = self.tokens_seen = 0
        self.lr = 0.0
        self._clock = Stopwatch(device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        # Gradient norm, masked tokens, pairs and number of the steps that were not skipped, the same on all ranks.
        self._shared = torch.zeros(4, dtype=torch.float64, device=device)
        self._readback: Readback | None = None

    def add(self, counts: Counts, result: StepResult) -> None:
        """Adds a step with ``counts`` in the micro-batches of all ranks. Does not synchronise."""
        self.steps += 1
        self.tokens += counts.tokens
        self.flops += counts.flops
        kept = 1.0 - result.skipped.double()
        self._sums += torch.where(kept > 0.0, result.sums, 0.0)
        norm, masked, pairs, steps = self._shared.unbind()
        norm += result.grad_norm
        masked.add_(kept, alpha=counts.num_masked)
        pairs.add_(kept, alpha=counts.num_pairs)
        steps += kept

    def close(self, step: int, tokens_seen: int, lr: float) -> None:
        """Ends the interval after step number ``step`` of the run. Does not synchronise."""
        self._clock.stop()
        self.step, self.tokens_seen, self.lr = step, tokens_seen, lr
        self._readback = Readback(torch.cat([self._sums, self._shared]))

    def ready(self) -> bool:
        """Whether the interval is closed and `read` returns without waiting for the device."""
        return self._readback is not None and self._readback.ready()

    def read(self, matmul_rate: float, ranks: Ranks) -> dict[str, Any]:
        """The means over the steps that were not skipped and all ranks, as fields of a log record.

        Waits for the device if necessary. The losses are None if all steps were skipped.

        Args:
            matmul_rate: FLOP/s of all ranks, the denominator of MFU.
        """
        assert self._readback is not None
        *sums, grad_norms, masked, pairs, kept = self._readback.values()
        seconds = self._clock.seconds() if ranks.first else 0.0
        mlm_loss, nsp_loss, mlm_correct, nsp_correct, seconds = ranks.sum([*sums, seconds])
        return {
            "mlm_loss": mlm_loss / max(masked, 1.0) if kept else None,
            "mlm_accuracy": mlm_correct / max(masked, 1.0) if kept else None,
            "nsp_loss": nsp_loss / pairs if pairs else None,
            "nsp_accuracy": nsp_correct / pairs if pairs else None,
            "grad_norm": grad_norms / kept if kept else None,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / matmul_rate,
            "seconds": seconds,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by PyTorch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
