"""A lock on a run's folder, so that two runs do not write to it at the same time."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from ..errors import UserError

NAME = ".lock"


class RunLock:
    """Holds ``out`` until `release` or the end of the process, however it ends. Makes the folder if it is missing.

    The lock is POSIX's: worker processes do not inherit it, and it works over NFS. A file system without locks is used
    without one.

    Raises:
        UserError: another process holds the folder.
    """

    def __init__(self, out: Path) -> None:
        import fcntl  # not on Windows

        self._out, self._made = out, not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        self._file = open(out / NAME, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read(200).strip() or "unknown"
            self._file.close()
            raise UserError(
                f"another run is writing to {out} ({holder}): wait until it ends, stop it, or give another --out"
            ) from None
        except OSError:  # no locks here
            return
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing writes again
                self._file.close()
            raise OSError(error.errno, error.strerror, str(out / NAME)) from error

    def release(self) -> None:
        """Releases the folder; removes it if this lock made it and nothing was written to it."""
        if self._made and [path.name for path in self._out.iterdir()] == [NAME]:
            (self._out / NAME).unlink()
            with contextlib.suppress(OSError):
                self._out.rmdir()
        self._file.close()
