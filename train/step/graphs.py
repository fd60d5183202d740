"""A training step on static buffers, captured as CUDA graphs: one launch where there were hundreds.

Three graphs share one memory pool and are replayed in the order of their capture:

    first    forward and backward of the first micro-batch; the gradients come to be here
    next     the same, adding to them: replayed for each further micro-batch
    update   clip, optimiser

The first steps run as they are, on the stream that will be captured, so that kernels are compiled and states exist. A
replay reads the static batch, the counts and the learning rate from where they always are; dropout seeds come from
PyTorch's CUDA generator, which moves on at each replay, so every step has masks of its own. Where a capture fails, the
run says so once and goes on without graphs.

On a CPU there is nothing to capture: the same functions run on the same buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ...model.batch import PackedBatch
from .static_batch import StaticBatch

if TYPE_CHECKING:
    from .step import TrainingStep

WARMUP_STEPS = 3  # before the capture: PyTorch's own advice for a backward


class StepGraphs:
    """Runs a `TrainingStep`'s two functions, from graphs once they are captured.

    Attributes:
        captured: replaying, from now on.
    """

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self._on_gpu = step.device.type == "cuda"
        self._static: StaticBatch | None = None
        self._steps = 0
        self._stream = torch.cuda.Stream(step.device) if self._on_gpu else None
        self._graphs: dict[str, torch.cuda.CUDAGraph] | None = None
        self._gradients: list[torch.Tensor | None] = []

    @property
    def captured(self) -> bool:
        return self._graphs is not None

    def __call__(self, window: Sequence[PackedBatch], seeds: Sequence[int] | None) -> None:
        """All of a step but the writing of counts and rate. ``seeds``: as the step's."""
        if self._static is None:
            self._static = StaticBatch(window[0], self._step.device)
        if self._on_gpu and self._steps == WARMUP_STEPS:
            self._capture(self._static)
        self._steps += 1
        if self._graphs is not None:
            for i, batch in enumerate(window):
                _seed(seeds, i)
                self._static.load(batch)
                self._graphs["first" if i == 0 else "next"].replay()
            self._graphs["update"].replay()
        elif self._stream is None:
            self._run(self._static, window, seeds)
        else:
            outside = torch.cuda.current_stream(self._step.device)
            self._stream.wait_stream(outside)
            with torch.cuda.stream(self._stream):
                self._run(self._static, window, seeds)
            outside.wait_stream(self._stream)

    def _run(self, static: StaticBatch, window: Sequence[PackedBatch], seeds: Sequence[int] | None) -> None:
        for i, batch in enumerate(window):
            _seed(seeds, i)
            self._step.micro_batch(static.load(batch), first=i == 0)
        self._step.update()
        self._step.optimizer.zero_grad(set_to_none=True)

    def _capture(self, static: StaticBatch) -> None:
        """Captures all three. The gradients stay where the first makes them: nothing sets them to None again."""

        parts: dict[str, Callable[[], None]] = {
            "first": lambda: self._step.micro_batch(static.batch, first=True),
            "next": lambda: self._step.micro_batch(static.batch, first=False),
            "update": self._step.update,
        }
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        try:
            for name, part in parts.items():
                graphs[name] = torch.cuda.CUDAGraph()
                # thread_local: the loader's thread goes on pinning memory meanwhile.
                with torch.cuda.graph(graphs[name], pool, self._stream, capture_error_mode="thread_local"):
                    part()
        except RuntimeError as error:  # what CUDA refuses, no memory left among it
            self._step.optimizer.zero_grad(set_to_none=True)
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
        # Whoever else sets them to None must not give their memory back: the graphs write there.
        self._gradients = [p.grad for group in self._step.optimizer.param_groups for p in group["params"]]


def _seed(seeds: Sequence[int] | None, i: int) -> None:
    """A replay reads the CUDA generator's seed, too."""
    if seeds is not None:
        torch.manual_seed(seeds[i])


__all__ = ["StepGraphs"]
