"""Where a result was measured: machine, GPU, driver, versions, commit, and the clocks during the run.

``python -m fusebert.bench.environment`` prints it. A figure means little if the GPU was throttled for half of the run:
nvidia-smi runs beside the benchmark as a process of its own and samples the driver twice a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import field
from typing import IO

import numpy as np
import torch

from ...train.environment import commit, processor, source_sha256, versions
from .serialise import OPTIONAL, to_json
from .timing import l2_bytes

PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "flash-attn", "xformers", "cut-cross-entropy")
THROTTLE = "clocks_throttle_reasons.active"  # a bit mask in hexadecimal
SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    THROTTLE,
)
SAMPLED = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")  # MHz, MHz, °C, W
INTERVAL_MS = 500
# Bits of THROTTLE that are not counted as throttling: none, idle, clocks set by an application or by a sync group.
HARMLESS = 0x1 | 0x2 | 0x10


@dataclasses.dataclass(frozen=True)
class GPU:
    """A GPU as PyTorch and nvidia-smi describe it. ``nvidia_smi``: field → value, None without nvidia-smi."""

    name: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    cuda: str | None
    cudnn: int | None
    nvidia_smi: dict[str, str] | None


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where a result was measured.

    Attributes:
        commit: of the sources, ``-dirty`` where they differ from it; None where it is not known.
        source_sha256: hash of the package's Python files.
        device: "cuda" or "cpu".
        torch_threads: threads of PyTorch's CPU operators.
        versions: package → version, None where it is not installed.
    """

    date: str
    commit: str | None
    source_sha256: str
    device: str
    python: str
    platform: str
    processor: str
    cores: int | None
    torch_threads: int
    versions: dict[str, str | None]
    gpu: GPU | None = field(default=None, metadata=OPTIONAL)

    @property
    def device_name(self) -> str:
        """The GPU's name, or "CPU path"."""
        return self.gpu.name if self.gpu else "CPU path"

    def describe(self) -> str:
        """Two lines: the hardware, and the versions."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        if self.gpu:
            driver = (self.gpu.nvidia_smi or {}).get("driver_version", "unknown")
            where = f"{self.gpu.name}, {self.gpu.multiprocessors} multiprocessors, driver {driver}"
        else:
            where = (
                f"CPU path: {self.processor}, {self.torch_threads} thread(s). No GPU is used: these figures say "
                "nothing about the Triton kernels"
            )
        return f"{where}\n{versions}; Python {self.python}; commit {self.commit or 'unknown'}; {self.date}"


@dataclasses.dataclass(frozen=True)
class Range:
    """Least, median and most of some samples."""

    min: float
    median: float
    max: float


@dataclasses.dataclass(frozen=True)
class ClockSummary:
    """What a GPU's clocks, temperature and power were during a run.

    Attributes:
        throttled: share of the samples in which the driver held the clocks down (power, heat, a hardware slowdown).
        sm, memory: clocks in MHz.
        temperature: °C.
        power: W.
    """

    samples: int
    throttled: float
    sm: Range = field(metadata={"key": "clocks.sm"})
    memory: Range = field(metadata={"key": "clocks.mem"})
    temperature: Range = field(metadata={"key": "temperature.gpu"})
    power: Range = field(metadata={"key": "power.draw"})

    def describe(self) -> str:
        """One line."""
        line = (
            f"clocks seen: SM {self.sm.min:.0f} to {self.sm.max:.0f} MHz, median {self.sm.median:.0f}; "
            f"up to {self.power.max:.0f} W, {self.temperature.max:.0f} °C"
        )
        held = f"; HELD DOWN by the driver in {100 * self.throttled:.0f} % of the samples"
        return line + (held if self.throttled else "")


def _output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _smi_command(device: torch.device, fields: tuple[str, ...]) -> list[str]:
    """nvidia-smi for this GPU, by UUID: CUDA_VISIBLE_DEVICES may renumber the GPUs."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [] if uuid is None else ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"]
    return ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks (MHz), temperature (°C) and power (W) of a GPU now; None on a CPU and without nvidia-smi."""
    printed = _output(*_smi_command(device, SMI_FIELDS)) if device.type == "cuda" else None
    if not printed:
        return None
    values = (value.strip() for value in printed.splitlines()[0].split(","))
    return dict(zip(SMI_FIELDS, values, strict=False))


def environment(device: torch.device) -> Environment:
    """Everything about this machine that a result on ``device`` depends on."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = GPU(
            name=properties.name,
            compute_capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            l2_bytes=l2_bytes(device),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nvidia_smi=nvidia_smi(device),
        )
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        source_sha256=source_sha256(),
        device=device.type,
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        versions=versions(PACKAGES),
        gpu=gpu,
    )


def summarise_clocks(lines: list[str]) -> ClockSummary | None:
    """The summary of nvidia-smi's lines, one a sample; None without a whole line."""
    rows, throttled = [], []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        with contextlib.suppress(ValueError):  # "[N/A]", or a line cut short
            *numbers, reasons = cells
            row = [float(x) for x in numbers]
            bits = int(reasons, 16)
            if len(row) == len(SAMPLED):
                rows.append(row)
                throttled.append(bool(bits & ~HARMLESS))
    if not rows:
        return None
    ranges = [Range(x.min().item(), float(np.median(x)), x.max().item()) for x in np.array(rows).T]
    return ClockSummary(len(rows), float(np.mean(throttled)), *ranges)


class Clocks:
    """Samples a GPU's clocks while the block runs.

    Attributes:
        found: the summary, when the block has ended; None on a CPU and without nvidia-smi.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: ClockSummary | None = None
        self._process: subprocess.Popen[str] | None = None
        self._output: IO[str] | None = None

    def __enter__(self) -> Clocks:
        if self.device.type == "cuda":
            command = [*_smi_command(self.device, (*SAMPLED, THROTTLE)), f"-lms={INTERVAL_MS}"]
            self._output = tempfile.TemporaryFile("w+")
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._output is not None:
            self._output.seek(0)
            self.found = summarise_clocks(self._output.read().splitlines())
            self._output.close()


def main() -> None:
    here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(here.describe())
    print(json.dumps(to_json(here), indent=1))
