"""A table of the documents of a text, in a file: a hash and the size of each.

Memory does not depend on the number of documents. Copies are found by their hashes, part by part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

_ROW = np.dtype([("split_hash", "<u8"), ("rank_hash", "<u8"), ("bytes", "<u4")])
_ROWS_AT_ONCE = 1 << 20
_PENDING_BYTES = 1 << 20
_PART_ROWS = 1 << 22  # documents whose hashes are sorted at once: about 200 MB


class DocumentTable:
    """One row for each document, in the order of the text. Call `close` after the last `add`.

    Args:
        path: of the file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._pending = bytearray()
        self._rows = np.empty(0, dtype=_ROW)

    def add(self, digest: bytes, size: int) -> None:
        """Appends a document.

        Args:
            digest: 16 bytes: split hash, rank hash.
            size: bytes of its text, below 2³².
        """
        self._pending += digest + size.to_bytes(4, "little")
        if len(self._pending) >= _PENDING_BYTES:
            self._file.write(self._pending)
            self._pending.clear()

    def close(self) -> None:
        """Ends the writing. The other methods may be used from now on."""
        self._file.write(self._pending)
        self._pending.clear()
        self._file.close()
        if self._path.stat().st_size:
            self._rows = np.memmap(self._path, dtype=_ROW, mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(where, rows) of parts of the table, in order; rows have the fields split_hash, rank_hash and bytes."""
        for start in range(0, len(self._rows), _ROWS_AT_ONCE):
            where = slice(start, start + _ROWS_AT_ONCE)
            yield where, np.asarray(self._rows[where])

    def copies(self, part_rows: int = _PART_ROWS) -> np.ndarray:
        """bool [documents]: whether an earlier document has the same text (the same 128 bits of hash).

        Args:
            part_rows: about so many documents are compared at once.
        """
        is_copy = np.zeros(len(self), dtype=bool)
        parts = -(-len(self) // part_rows)
        for part in range(parts):
            found = []
            for where, rows in self.chunks():
                mine = (
                    np.flatnonzero(rows["rank_hash"] % np.uint64(parts) == part) if parts > 1 else np.arange(len(rows))
                )
                found.append(mine + where.start)
            row = np.concatenate(found)
            split_hash, rank_hash = self._rows["split_hash"][row], self._rows["rank_hash"][row]
            order = np.lexsort((split_hash, rank_hash))  # stable: the first of equal documents stays first
            split_hash, rank_hash = split_hash[order], rank_hash[order]
            same = (split_hash[1:] == split_hash[:-1]) & (rank_hash[1:] == rank_hash[:-1])
            is_copy[row[order[1:][same]]] = True
        return is_copy
