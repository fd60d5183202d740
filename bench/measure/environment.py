"""Where and on what a result was measured: machine, GPU, driver, versions, commit, clocks.

``python -m fusebert.bench.environment`` prints it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from typing import Any

import torch

from ...train.environment import commit, processor, source_sha256, versions
from .clocks import select_gpu
from .timing import l2_bytes

PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "flash-attn", "xformers", "cut-cross-entropy")
_NVIDIA_SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "clocks_throttle_reasons.active",
)


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def nvidia_smi(device: torch.device | None = None) -> dict[str, str] | None:
    """Driver, clocks (MHz), temperature (°C) and power (W) of a GPU, PyTorch's first, as they are now; None without."""
    which = select_gpu(device or torch.device("cuda")) if torch.cuda.is_available() else []
    query = _output(
        "nvidia-smi", *which, f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits"
    )
    if not query:
        return None
    values = (value.strip() for value in query.splitlines()[0].split(","))
    return dict(zip(_NVIDIA_SMI_FIELDS, values, strict=False))


def environment(device: torch.device) -> dict[str, Any]:
    """Everything above for results measured on ``device``, as JSON types."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "source_sha256": source_sha256(),
        "device": device.type,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(PACKAGES),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": l2_bytes(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": nvidia_smi(device),
        }
    return found


def describe(found: dict[str, Any]) -> str:
    """Two lines that say on what the figures below them were measured."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    if "gpu" in found:
        gpu = found["gpu"]
        smi = gpu["nvidia_smi"] or {}
        where = (
            f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, driver {smi.get('driver_version', 'unknown')}"
        )
    else:
        where = (
            f"CPU path: {found['processor']}, {found['torch_threads']} thread(s). No GPU is used: these figures say "
            "nothing about the Triton kernels"
        )
    return f"{where}\n{versions}; Python {found['python']}; commit {found['commit'] or 'unknown'}; {found['date']}"


def main() -> None:
    here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(describe(here))
    print(json.dumps(here, indent=1))
