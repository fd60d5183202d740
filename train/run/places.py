"""What may be where a run writes its files and folders."""

from __future__ import annotations

import errno
from pathlib import Path

from .lock import NAME as LOCK

FOLDERS = ("checkpoints", "hf", "inputs", "nonfinite", "tensorboard")
FILES = ("log.jsonl", "run.json", "report.md", "report.json", "loss.png")


def check_places(out: Path) -> None:
    """Checks that the folder of a run, and what the run writes to it, are of the right kind, or missing.

    Folders may be links to folders. A file that is a link is replaced; what it points to is not changed.

    Raises:
        OSError: something else is there. It names the path and what to do.
    """
    for path in (out, *(out / name for name in FOLDERS)):
        if not path.is_dir() and (path.exists() or path.is_symlink()):
            what = "a link to a folder that is not there" if not path.exists() else "no folder"
            raise NotADirectoryError(errno.ENOTDIR, f"{what}: move it away, or give another --out", str(path))
    for path in (out / name for name in (*FILES, LOCK)):
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise IsADirectoryError(errno.EISDIR, "no file: move it away, or give another --out", str(path))
    if (out / LOCK).is_symlink():  # the lock would overwrite what it points to
        raise FileExistsError(errno.EEXIST, "a link: remove it, or give another --out", str(out / LOCK))
