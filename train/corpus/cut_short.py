"""Files that become shorter while they are mapped into memory.

Reading a mapped page behind the end of its file raises SIGBUS, which ends the process without a word. `check_length`
finds such a file before it is read. `remember` covers the moment in between: from then on the process prints the name
of the file when SIGBUS comes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import signal
import weakref
from pathlib import Path

import numpy as np

from .format import CorpusError

_maps: weakref.WeakKeyDictionary[mmap.mmap, tuple[Path, int]] = weakref.WeakKeyDictionary()  # (file, bytes mapped)
_handlers: list[object] = []  # must outlive the call that installs them


def remember(path: Path, array: np.ndarray) -> None:
    """Call it with each mapped array (`numpy.memmap`)."""
    if isinstance(array.base, mmap.mmap):
        _maps[array.base] = (path, len(array.base))
        _handle_bus_errors()


def check_length(path: Path, array: np.ndarray) -> None:
    """Raises CorpusError if the file that ``array`` maps has become shorter."""
    if isinstance(array.base, mmap.mmap) and array.base.size() < len(array.base):
        raise CorpusError(_message(path))


def _message(path: Path) -> str:
    return f"{path} became shorter while it was read: restore the file, or prepare the corpus again"


@functools.cache
def _handle_bus_errors() -> None:
    # Python's own handlers run after the instruction that raised the signal, which is never completed here.
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    before: list[int | None] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(number: int) -> None:
        for opened, (path, length) in list(_maps.items()):
            if opened.size() < length:
                os.write(2, f"fusebert: error: {_message(path)}\n".encode())
                os._exit(1)
        libc.signal(number, before[0])  # another cause: let the instruction fail again

    _handlers.append(explain)
    before.append(libc.signal(signal.SIGBUS, ctypes.cast(explain, ctypes.c_void_p)))
