"""``fusebert bench predict``: a training step's time on a GPU that need not be here, predicted from the compiled code.

    our kernels        `compiled.speed_of_light`, of each launch: the largest resource, and the sum of all
    matrix products    max(FLOPs / matmul rate, bytes / copy rate): cuBLAS as fast as in a large square product
    other operators    bytes / copy rate: PyTorch's kernels as fast as a copy
    launches           each kernel, 2 µs

The step's calls and launches come from `dry_run`, so nothing is assumed about what a step consists of.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.backend import interpreting, triton
from ...train.environment import commit
from ...train.errors import UserError
from ...train.step.flops import batch_flops
from ..compiled.aot import Launch
from ..compiled.speed_of_light import predict
from ..measure.gpus import GPU, GPUS, LAUNCH_SECONDS
from ..measure.prediction import KernelPrediction, OtherCall, StepPrediction
from ..measure.result import PredictAbout, PredictResult, write_result
from ..measure.settings import DTYPES, PredictOptions, PredictSettings, settings_of
from .batches import random_batches
from .contestants import preset
from .dry_run import Calls, dry_step

RAGGED_SAMPLE = 128  # programs of an attention kernel, where they differ
SAMPLE = 3  # of other kernels


def _same_launch(operator: str, launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that do the same work."""
    sizes = tuple(
        (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in launch.arguments.values()
    )
    return operator, launch.resources.name, launch.grid, sizes


class Kernels:
    """Predicts each launch once and counts how often it occurs.

    Args:
        ragged: segments have different lengths, so more of attention's programs are sampled.
        show, keep: as of `predicted`.
    """

    def __init__(
        self,
        gpu: GPU,
        ragged: bool,
        show: Callable[[Any], None],
        keep: Callable[[Launch], None] = lambda _: None,
    ) -> None:
        self._gpu, self._ragged, self._show, self._keep = gpu, ragged, show, keep
        self._found: dict[tuple[Any, ...], KernelPrediction] = {}

    def observe(self, operator: str, launch: Launch) -> None:
        """A launch by one of our operators."""
        key = _same_launch(operator, launch)
        before = self._found.get(key)
        if before is not None:
            self._found[key] = dataclasses.replace(before, launches=before.launches + 1)
            return
        sample = RAGGED_SAMPLE if self._ragged and "attention" in operator else SAMPLE
        self._found[key] = predict(launch, self._gpu, call=operator, sample=sample)
        self._keep(launch)
        self._show(f"counted {operator}: {launch.resources.name}")

    def rows(self) -> list[KernelPrediction]:
        """Of the launches so far, in the order in which they occurred first."""
        return list(self._found.values())


def others_of(calls: dict[str, Calls], gpu: GPU) -> list[OtherCall]:
    """PyTorch's operators at the rates of ``gpu``, the longest first."""
    rows = []
    for name, found in calls.items():
        seconds = max(found.flops / gpu.matmul_flops_per_s, found.bytes / gpu.copy_bytes_per_s)
        rows.append(OtherCall(name, found.count, found.flops, found.bytes, 1e6 * seconds))
    return sorted(rows, key=lambda row: -row.us)


def _step(
    kernels: list[KernelPrediction], others: list[OtherCall], gpu: GPU, tokens: float, flops: float
) -> StepPrediction | None:
    """The sums; None where a kernel is refused."""
    if any(row.refused for row in kernels):
        return None
    launches = sum(row.launches for row in kernels) + sum(row.calls for row in others)
    products = sum(row.us for row in others if row.flops)
    rest = sum(row.us for row in others if not row.flops)
    between = sum(row.launches * row.hbm_bytes for row in kernels) + sum(row.bytes for row in others if not row.flops)
    return StepPrediction(
        tokens=tokens,
        products_us=products,
        others_us=rest,
        kernels_bound_us=sum(row.launches * row.bound_us for row in kernels),
        kernels_sum_us=sum(row.launches * row.sum_us for row in kernels),
        launches=launches,
        launches_us=1e6 * launches * LAUNCH_SECONDS,
        floor_us=1e6 * (flops / gpu.matmul_flops_per_s + between / gpu.copy_bytes_per_s),
    )


def check_options(options: PredictSettings) -> None:
    """Raises UserError: the dtype or the GPU is not one of those allowed, or the process has Triton's interpreter."""
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}: choose one of {', '.join(GPUS)}")
    if options.dtype not in ("bf16", "fp16"):
        raise UserError(f"--dtype {options.dtype}: only bf16 and fp16 are predicted")
    if interpreting():
        raise UserError("TRITON_INTERPRET=1 replaces the compiler; unset it")


def about(gpu: GPU) -> PredictAbout:
    """How a prediction is made here and now."""
    return PredictAbout(
        date=f"{datetime.date.today()}",
        commit=commit(),
        triton=triton.__version__,
        torch=torch.__version__,
        gpu=dataclasses.asdict(gpu),
    )


def predicted(
    options: PredictSettings, gpu: GPU, *, show: Callable[[Any], None], keep: Callable[[Launch], None] = lambda _: None
) -> PredictResult:
    """The prediction of a step.

    Args:
        show: takes a line for each kernel.
        keep: takes the launch of each row of ``kernels``, in their order, when it occurs for the first time.

    Raises:
        UserError: as `check_options`.
        ValueError: a setting is out of range.
    """
    check_options(options)
    dtype = getattr(torch, DTYPES[options.dtype])
    config = preset(options.model, options.vocab_size, seqlen=options.seqlen, dropout=options.dropout)
    (batch,) = random_batches(options.vocab_size, options.tokens, options.seqlen, 1, ragged=options.ragged)
    kernels = Kernels(gpu, options.ragged, show, keep)
    others = others_of(dry_step(config, batch, dtype, gpu, kernels.observe), gpu)
    rows = kernels.rows()
    return PredictResult(
        about=about(gpu),
        settings=settings_of(PredictSettings, options),
        kernels=rows,
        others=others,
        step=_step(rows, others, gpu, batch.num_tokens, batch_flops(config, batch)),
    )


def run(options: PredictOptions, *, show: Callable[[Any], None] = print) -> PredictResult:
    """Predict, show what was found, and return (and write) the result.

    Args:
        options: ``gpu``, ``dtype``, ``model`` and the batch's shape.
        show: takes a line for each kernel, then the result.

    Raises:
        UserError, ValueError: as `predicted`.
    """
    check_options(options)
    result = predicted(options, GPUS[options.gpu], show=show)
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result
