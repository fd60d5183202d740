"""The software and the processor that a result was computed with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

SOURCE_FOLDERS = ("bench", "kernels", "model", "train")


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None for a package that is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the sources, from ``FUSEBERT_COMMIT`` or git; None if neither is available.

    git's answer ends in ``-dirty`` if the working tree has uncommitted changes.
    """
    if given := os.environ.get("FUSEBERT_COMMIT"):
        return given
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def source_sha256() -> str:
    """A hash of the paths and contents of all Python files of fusebert, subfolders included."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in SOURCE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
