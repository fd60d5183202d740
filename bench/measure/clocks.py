"""The clocks, temperature and power a GPU really had while it was measured: sampled by nvidia-smi, summarised.

A figure means little if the GPU was throttled for half of the run. nvidia-smi runs beside the benchmark as a process of
its own and asks the driver twice a second; nothing of it is on the GPU's or on the benchmark's threads.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from typing import IO, Any

import numpy as np
import torch

FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")  # MHz, MHz, °C, W
THROTTLE = "clocks_throttle_reasons.active"  # a bit mask in hexadecimal
INTERVAL_MS = 500
# Bits that are no complaint: none, idle, clocks set by an application, by the sync boost of a group.
HARMLESS = 0x1 | 0x2 | 0x10


def select_gpu(device: torch.device) -> list[str]:
    """nvidia-smi's option for this GPU, which need not be its first: CUDA_VISIBLE_DEVICES may renumber them."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return [] if uuid is None else ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"]


def summary(lines: list[str]) -> dict[str, Any] | None:
    """Of nvidia-smi's lines, one a sample: least, median and most of each field; None where none is whole.

    ``throttled`` is the share of samples in which the driver held the clocks down (power, heat or a hardware slowdown).
    """
    rows, throttled = [], []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        with contextlib.suppress(ValueError):  # "[N/A]", or a line cut short
            *numbers, reasons = cells
            row = [float(x) for x in numbers]
            bits = int(reasons, 16)
            if len(row) == len(FIELDS):
                rows.append(row)
                throttled.append(bool(bits & ~HARMLESS))
    if not rows:
        return None
    found: dict[str, Any] = {"samples": len(rows), "throttled": float(np.mean(throttled))}
    for name, values in zip(FIELDS, np.array(rows).T, strict=True):
        found[name] = {"min": values.min().item(), "median": np.median(values).item(), "max": values.max().item()}
    return found


class Clocks:
    """Samples while the block runs; does nothing, and finds None, without a GPU or without nvidia-smi.

    Attributes:
        found: `summary` of the block, when it has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, Any] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._output: IO[str] | None = None

    def __enter__(self) -> Clocks:
        if self.device.type == "cuda":
            query = f"--query-gpu={','.join((*FIELDS, THROTTLE))}"
            command = ["nvidia-smi", *select_gpu(self.device), query, "--format=csv,noheader,nounits"]
            self._output = tempfile.TemporaryFile("w+")
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    [*command, f"-lms={INTERVAL_MS}"], stdout=self._output, stderr=subprocess.DEVNULL, text=True
                )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._output is not None:
            self._output.seek(0)
            self.found = summary(self._output.read().splitlines())
            self._output.close()


def clock_lines(found: dict[str, Any] | None) -> list[str]:
    """In words."""
    if found is None:
        return []
    sm, power, heat = (found[name] for name in ("clocks.sm", "power.draw", "temperature.gpu"))
    line = (
        f"clocks seen: SM {sm['min']:.0f} to {sm['max']:.0f} MHz, median {sm['median']:.0f}; "
        f"up to {power['max']:.0f} W, {heat['max']:.0f} °C"
    )
    held = found["throttled"]
    return [line + (f"; HELD DOWN by the driver in {100 * held:.0f} % of the samples" if held else "")]


__all__ = ["Clocks", "clock_lines", "select_gpu", "summary"]
