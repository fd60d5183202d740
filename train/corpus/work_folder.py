"""Folders beside a corpus that are in use while it is made, and the removal of those that killed processes left.

    OUT.scratch-XXXXXXXX     the tokenizer, the table of the documents, and copies of input that can be read only once
    OUT.partial-XXXXXXXX     the new corpus, until it is complete
    OUT.replaced-XXXXXXXX    the old corpus, while the new one takes its name

The process that uses a folder holds a shared lock on it, which the system releases when the process ends, however it
ends. Where the file system has no such locks, nothing is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from .format import is_corpus_file

DOCUMENTS = "documents.table"
_SCRATCH_FILES = (DOCUMENTS, "stdin", "pydocs.jsonl", "stdin.txt")  # the last one of earlier versions


class WorkFolder:
    """A folder that this process uses: a new one, or one that is there.

    Attributes:
        path: the folder. It may be renamed meanwhile; the lock stays on it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    @classmethod
    def make(cls, place: Path, kind: str) -> WorkFolder:
        """An empty folder for the corpus at ``place``.

        Args:
            kind: "scratch" or "partial".
        """
        while True:
            path = work_path(place, kind)
            path.mkdir(0o700 if kind == "scratch" else 0o777, parents=True)
            with contextlib.suppress(FileNotFoundError):  # removed by another process before it was locked
                folder = cls(path)
                if path.exists():
                    return folder
                folder.release()

    def release(self) -> None:
        """Gives up the lock and leaves the folder where it is."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def remove(self) -> None:
        """Removes the folder, unless it was renamed, and gives up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


def work_path(place: Path, kind: str) -> Path:
    """A new name for a folder of ``kind`` "scratch", "partial" or "replaced" beside ``place``."""
    return place.with_name(f"{place.name}.{kind}-{secrets.token_hex(4)}")


def remove_leftovers(place: Path) -> None:
    """Removes the folders beside the corpus at ``place`` that no living process uses.

    If a process was killed while it exchanged two corpora, so that none is at ``place``, the old one is put back.
    Folders with other files than ours are left alone.
    """
    name = re.compile(re.escape(place.name) + r"\.(scratch|partial|replaced)-([0-9a-z_]{8}|\d+)")
    for path in sorted(place.parent.glob(glob.escape(place.name) + ".*-*")):
        match = name.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if not all(_is_ours(inner) for inner in os.listdir(path)):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if match[1] == "replaced" and not place.exists():
                os.rename(path, place)
                warnings.warn(
                    f"a process was killed while it replaced {place}: the corpus from before is there again",
                    stacklevel=2,
                )
            else:
                shutil.rmtree(path)
        except OSError:  # in use, or not removable
            continue
        finally:
            os.close(handle)


def _is_ours(name: str) -> bool:
    inner = re.fullmatch(r"\.(.+)\.partial-\d+", name)  # of `replace_file`
    return is_corpus_file(inner[1] if inner else name) or name in _SCRATCH_FILES
