"""Where and on what a result was measured: machine, GPU, driver, versions, commit, clocks.

``python -m fusebert.bench.environment`` prints it.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

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


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True)
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


def commit() -> str | None:
    """The source's commit, ``-dirty`` where the tree differs from it; from ``FUSEBERT_COMMIT`` where that is set."""
    described = _output("git", "describe", "--always", "--dirty", "--abbrev=12", cwd=Path(__file__).parent)
    return os.environ.get("FUSEBERT_COMMIT") or described


def source_sha256() -> str:
    """A hash of the package's Python files: the same code has the same hash, with or without git."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in ("bench", "kernels", "model", "train"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(device: torch.device) -> dict[str, Any]:
    """Everything above for results measured on ``device``, as JSON types."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "source_sha256": source_sha256(),
        "device": device.type,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
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
