"""``fusebert bench calibrate``: each kernel of a predicted step on that GPU, its time beside the prediction.

A launch that the dry step recorded is run with its own grid, shapes, strides and integers, on random numbers (see
`compiled.replay`), and timed as an operator is (see `measure.timing`). So the table says how far the model of
`compiled.speed_of_light` is from the machine, kernel by kernel: measured over bound is what latency and missing
overlap cost, and measured over sum is above 1 only where something is not counted at all.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from ...train.errors import UserError
from ..compiled.aot import Launch
from ..compiled.replay import Replay
from ..measure.ceilings import measure_ceilings
from ..measure.gpus import GPUS, named
from ..measure.machine import Clocks, environment, nvidia_smi
from ..measure.memory import release_memory
from ..measure.prediction import KernelCalibration, KernelPrediction
from ..measure.result import CalibrationResult, write_result
from ..measure.settings import DTYPES, CalibrateOptions
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave, l2_bytes
from ..measure.verify import one_line
from .predict import predicted

SECONDS = 0.4  # of a kernel
MAX_ROUNDS = 40
# Calls rotate through so many sets of tensors that the L2 has evicted the first before its next use.
L2_MULTIPLE, MOST_SETS = 4, 64


def rates_of(device: torch.device, name: str) -> str:
    """The key in `GPUS` to predict ``device`` with. name: a key, or "auto" for the one that the device is called.

    Raises:
        UserError: the device is no GPU or not one of `GPUS`, or there is no such key, or it has another architecture.
    """
    known = ", ".join(GPUS)
    if device.type != "cuda":
        raise UserError("there is no GPU to measure on; fusebert bench predict needs none")
    here = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    if name == "auto":
        found = named(here)
        if found is None:
            raise UserError(f"bench/measure/gpus.py has no rates for {here}: give the nearest as --gpu, {known}")
    elif name in GPUS:
        found = name
    else:
        raise UserError(f"--gpu {name}: choose one of auto, {known}")
    if GPUS[found].arch != 10 * major + minor:
        raise UserError(f"--gpu {name}: {GPUS[found].name} is sm_{GPUS[found].arch}, {here} sm_{major}{minor}")
    return found


def timed(row: KernelPrediction, replay: Replay, device: torch.device) -> KernelCalibration:
    """``row`` with its time on the device, or with the reason why there is none."""
    try:
        count = math.ceil(L2_MULTIPLE * l2_bytes(device) / max(replay.bytes, 1))
        calls = [replay.on(device) for _ in range(max(1, min(MOST_SETS, count)))]
        work = Work(lambda call: call(), lambda index: calls[index % len(calls)])
        timing = interleave({"": work}, device, seconds=SECONDS, max_rounds=MAX_ROUNDS, device_time=True)[""]
    except Exception as error:  # the other kernels are still measured
        return KernelCalibration(row, None, failed=one_line(error))
    if row.refused:
        return KernelCalibration(row, timing)
    bound, total = ([1e-3 * us] * timing.rounds for us in (row.bound_us, row.sum_us))
    return KernelCalibration(row, timing, ratio(timing.samples_ms, bound), ratio(timing.samples_ms, total))


def run(options: CalibrateOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> CalibrationResult:
    """Predict, measure, show each record as it is made, and return (and write) the result.

    Args:
        options: ``minutes``: no kernel begins after it; those that take most of a step come first. ``out``: written
            after every kernel.

    Raises:
        UserError: as `rates_of`; or as `predict.predicted`.
    """
    begin = time.monotonic()
    options = dataclasses.replace(options, gpu=rates_of(device, options.gpu))
    where = environment(device)
    show(where)
    launches: list[Replay] = []

    def keep(launch: Launch) -> None:
        launches.append(Replay(launch))

    prediction = predicted(options, GPUS[options.gpu], show=show, keep=keep)
    show(f"predicted after {time.monotonic() - begin:.0f} s")
    limits = measure_ceilings(device, getattr(torch, DTYPES[options.dtype]), quick=True)
    show(limits)
    result = CalibrationResult(where, prediction.about, prediction.settings, limits)
    order = sorted(zip(prediction.kernels, launches, strict=True), key=lambda pair: -pair[0].launches * pair[0].sum_us)
    with Clocks(device) as clocks:
        for row, replay in order:
            if options.minutes is not None and time.monotonic() - begin > 60 * options.minutes:
                result.left_out.append(f"{row.call}: {row.kernel}")
                continue
            result.kernels.append(timed(row, replay, device))
            release_memory(device)
            show(result.kernels[-1])
            if options.out is not None:
                write_result(options.out, result)
    result.clocks = clocks.found
    result.seconds = time.monotonic() - begin
    result.nvidia_smi_after = nvidia_smi(device)
    if options.out is not None:
        write_result(options.out, result)
    show(result)
    return result
