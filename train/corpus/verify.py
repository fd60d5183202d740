"""Verify the files of a corpus by their hashes. The result is remembered in the corpus's folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...model.atomic import replace_file
from ...model.json_file import read_json
from ..text.workers import available_cores
from .format import VERIFIED, CorpusError, file_sha256


def verify_files(directory: Path, recorded: Mapping[str, Mapping[str, Any]], *, show_progress: bool = False) -> None:
    """Compares files with their hashes, several at a time.

    A file that passed is not read again while its size, modification time and inode stay the same. `VERIFIED` in
    ``directory`` remembers that; where it cannot be written, the next call reads all files.

    Args:
        directory: the corpus.
        recorded: name → entry in the manifest.
        show_progress: show a bar on standard error if it takes longer than two seconds.

    Raises:
        CorpusError: a file is damaged; the message names it.
        OSError: a file cannot be read.
    """
    remembered = _remembered(directory)
    states = {name: _state(directory / name, entry["sha256"]) for name, entry in recorded.items()}
    left = [name for name, state in states.items() if remembered.get(name) != state]
    if not left:
        return
    total = sum(recorded[name]["bytes"] for name in left)
    bar = tqdm(desc="verifying", total=total, unit="B", unit_scale=True, delay=2, disable=not show_progress)
    pool = ThreadPoolExecutor(min(len(left), available_cores()))  # hashing runs without Python's lock
    try:
        with bar:
            for name, found in zip(left, pool.map(file_sha256, [directory / name for name in left]), strict=True):
                if found != recorded[name]["sha256"]:
                    raise CorpusError(
                        f"{directory / name} is damaged: its sha256 differs from the manifest's: prepare the corpus "
                        "again (--no-verify trains on it as it is)"
                    )
                bar.update(recorded[name]["bytes"])
    finally:
        pool.shutdown(cancel_futures=True)
    with contextlib.suppress(OSError), replace_file(directory / VERIFIED) as path:  # the corpus may be read-only
        path.write_text(json.dumps(states, indent=1), encoding="utf-8")


def _state(path: Path, sha256: str) -> list[Any]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino, sha256]


def _remembered(directory: Path) -> dict[str, Any]:
    try:
        content = read_json(directory / VERIFIED)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
