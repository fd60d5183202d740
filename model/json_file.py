"""Read a JSON file that may be damaged, hostile, or no file at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The content of the JSON file ``path``.

    Args:
        most_bytes: a longer file is refused before it is parsed.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is not a regular file, is too long, or is not JSON. The message is the reason without the name.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else opening a FIFO waits for a writer
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("not a regular file")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(most_bytes + 1)
    finally:
        os.close(handle)
    if len(data) > most_bytes:
        raise ValueError(f"longer than {most_bytes >> 20} MiB")
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
