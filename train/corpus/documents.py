"""A table of the documents of a text, in a file: a hash and the size of each.

Memory does not depend on the number of documents. Copies are found by their hashes, part by part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

FIRST, COPY, COPY_OF_HELDOUT = range(3)  # what `DocumentTable.copies` says of a document
_ROW = np.dtype([("split_hash", "<u8"), ("rank_hash", "<u8"), ("bytes", "<u4"), ("heldout", "u1")])
_ROWS_AT_ONCE = 1 << 20
_PENDING_BYTES = 1 << 20
_PART_ROWS = 1 << 22  # hashes that are sorted at once: about 200 MB


def table_row(digest: bytes, size: int, heldout: bool) -> bytes:
    """The row of a document.

    Args:
        digest: 16 bytes: split hash, rank hash.
        size: bytes of its text, below 2³².
        heldout: it is from a file of --heldout-files. These come first.
    """
    return digest + size.to_bytes(4, "little") + bytes((heldout,))


class DocumentTable:
    """One row for each document, in the order of the text. Call `close` after the last `add`.

    Args:
        path: of the file to write.
    """

    ROW_BYTES = _ROW.itemsize

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._pending = bytearray()
        self._rows = np.empty(0, dtype=_ROW)

    def add(self, rows: bytes) -> None:
        """Appends documents.

        Args:
            rows: `table_row` of each, one after another.
        """
        self._pending += rows
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
        """(where, rows) of parts of the table, in order. The fields of rows: split_hash, rank_hash, bytes, heldout."""
        for start in range(0, len(self._rows), _ROWS_AT_ONCE):
            where = slice(start, start + _ROWS_AT_ONCE)
            yield where, np.asarray(self._rows[where])

    def sizes(self) -> np.ndarray:
        """uint32 [documents]: bytes of the text. A view of the file."""
        return self._rows["bytes"]

    def heldout(self) -> np.ndarray:
        """bool [documents]: whether it is from a file that is held out."""
        return self._rows["heldout"] == 1

    def copies(self, part_rows: int = _PART_ROWS) -> np.ndarray:
        """uint8 [documents]: `FIRST`, or whether an earlier document has the same text (the same 128 bits of hash):
        `COPY`, or `COPY_OF_HELDOUT` if the first one is held out.

        Args:
            part_rows: about so many documents are compared at once.
        """
        result = np.zeros(len(self), dtype=np.uint8)
        parts = -(-len(self) // part_rows)
        for part in range(parts):
            found = []
            for where, rows in self.chunks():
                found.append(np.flatnonzero(rows["rank_hash"] % np.uint64(parts) == part) + where.start)
            number = np.concatenate(found)
            rows = self._rows[number]
            order = np.lexsort((rows["split_hash"], rows["rank_hash"]))  # stable: the first of equal ones stays first
            rows, number = rows[order], number[order]
            is_first = np.ones(len(rows), dtype=bool)
            is_first[1:] = (rows["split_hash"][1:] != rows["split_hash"][:-1]) | (
                rows["rank_hash"][1:] != rows["rank_hash"][:-1]
            )
            of_heldout = rows["heldout"][np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
            result[number] = np.where(is_first, FIRST, COPY + of_heldout)
        return result
