"""Write files so that a crash leaves the old or the new content, never a part of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``. After the block its content is on disk under the name ``path``.

    The block writes the temporary file. If the block raises, ``path`` keeps its old content and the temporary file is
    removed.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. It names ``path``.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, partial, str(partial)):
            error.filename, error.filename2 = str(path), None
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk. A no-op where directories cannot be opened (Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
