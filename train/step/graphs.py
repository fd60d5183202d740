"""A training step on static buffers, captured as three CUDA graphs.

The graphs share one memory pool and are replayed in the order of their capture:

    first    forward and backward of the first micro-batch; allocates the gradients
    next     the same, adding to the gradients; replayed for each further micro-batch
    update   clip, optimiser

The first `WARMUP_STEPS` steps run without graphs, on the stream of the capture, so that kernels are compiled and the
optimiser's state is allocated. A replay reads the batch, the label counts and the learning rate from fixed addresses.
Dropout seeds come from PyTorch's CUDA generator, which advances at each replay, so each step has its own masks.

If a capture fails, a warning is issued and all steps run without graphs. On a CPU the same functions run on the same
static buffers without a capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ...model.batch import Batch
from .static_batch import StaticBatch

WARMUP_STEPS = 3  # before the capture: PyTorch's own advice for a backward


class MicroBatch(Protocol):
    """Forward and backward of one micro-batch."""

    def __call__(self, batch: Any, *, first: bool) -> None: ...


class StepGraphs:
    """Runs the two parts of a step on a static batch; on a GPU as graphs once they are captured.

    Args:
        micro_batch: forward and backward; adds to the gradients.
        update: clips the gradients and steps the optimiser.
        optimizer: of the parameters that ``micro_batch`` computes gradients for.
        static: the batch that the graphs read.
    """

    def __init__(
        self,
        micro_batch: MicroBatch,
        update: Callable[[], None],
        optimizer: torch.optim.Optimizer,
        static: StaticBatch,
    ) -> None:
        self._micro_batch, self._update, self._optimizer, self._static = micro_batch, update, optimizer, static
        self._steps = 0
        self._stream = torch.cuda.Stream(static.device) if static.device.type == "cuda" else None
        self._graphs: dict[str, torch.cuda.CUDAGraph] | None = None
        self._gradients: list[torch.Tensor | None] = []

    def __call__(self, window: Sequence[Batch], seeds: Sequence[int] | None) -> None:
        """One step on the micro-batches ``window``.

        Args:
            seeds: for torch's generators, one for each micro-batch; None leaves the generators alone.
        """
        if self._stream is not None and self._steps == WARMUP_STEPS:
            self._capture(self._stream)
        self._steps += 1
        if self._graphs is not None:
            for i, batch in enumerate(window):
                _seed(seeds, i)
                self._static.load(batch)
                self._graphs["first" if i == 0 else "next"].replay()
            self._graphs["update"].replay()
        elif self._stream is None:
            self._run(window, seeds)
        else:
            caller = torch.cuda.current_stream(self._static.device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                self._run(window, seeds)
            caller.wait_stream(self._stream)

    def _run(self, window: Sequence[Batch], seeds: Sequence[int] | None) -> None:
        for i, batch in enumerate(window):
            _seed(seeds, i)
            self._micro_batch(self._static.load(batch), first=i == 0)
        self._update()
        self._optimizer.zero_grad(set_to_none=True)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Captures the three graphs. The gradients are None before, so that "first" allocates them in its pool."""
        parts: dict[str, Callable[[], None]] = {
            "first": lambda: self._micro_batch(self._static.batch, first=True),
            "next": lambda: self._micro_batch(self._static.batch, first=False),
            "update": self._update,
        }
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        try:
            for name, part in parts.items():
                graphs[name] = torch.cuda.CUDAGraph()
                # thread_local: the loader's thread pins memory during the capture.
                with torch.cuda.graph(graphs[name], pool, stream, capture_error_mode="thread_local"):
                    part()
        except RuntimeError as error:  # an operation that cannot be captured, or no memory left
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the training step could not be captured as CUDA graphs ({reason}): it runs without them, as with "
                "--no-graph",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._graphs = graphs
        # Hold references: the graphs write into these gradients, even if p.grad is set to None elsewhere.
        self._gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"]]


def _seed(seeds: Sequence[int] | None, i: int) -> None:
    """Seeds torch's generators for micro-batch ``i``. A replay reads the CUDA generator's seed as well."""
    if seeds is not None:
        torch.manual_seed(seeds[i])
