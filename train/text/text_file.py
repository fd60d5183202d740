"""A file of text: its kind, by its name, and its content."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path, PurePath
from typing import Any, BinaryIO

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
TEXTS, RECORDS = (".txt", ".md"), (".jsonl", ".json", ".csv", ".tsv")  # may be compressed
COLUMNAR = (".parquet", ".arrow")  # compressed inside
SUFFIXES = tuple(kind + packed for kind in (*TEXTS, *RECORDS) for packed in ("", *COMPRESSIONS)) + COLUMNAR
FORMATS = tuple(kind[1:] for kind in (*TEXTS, *RECORDS))
ALLOWED = f"{', '.join(TEXTS + RECORDS)} (also {', '.join(COMPRESSIONS)}), {', '.join(COLUMNAR)} or no suffix"


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of documents.

    Attributes:
        path: where it is.
        name: what messages call it.
        given_format: one of `FORMATS` for a file name without a suffix; None: what its first characters look like.
    """

    path: PurePath
    name: str
    given_format: str | None = None

    @property
    def key(self) -> str:
        """The same for all names of one file."""
        return str(Path(self.path).resolve())

    def open(self) -> BinaryIO:
        """Its content as it is stored. Raises OSError."""
        return open(self.path, "rb")

    def version(self) -> tuple[Any, ...]:
        """(size in bytes, …): equal unless the file was written or replaced. Raises OSError."""
        state = os.stat(self.path)
        return state.st_size, state.st_mtime_ns, state.st_dev, state.st_ino

    def shared_version(self, version: tuple[Any, ...]) -> tuple[Any, ...]:
        """The part of a `version` that every machine sees alike. Machines that share a folder may number its device and
        its files differently."""
        return version[:2]

    def absolute(self) -> TextFile:
        """The same file, for a process that runs in another folder."""
        return dataclasses.replace(self, path=Path(os.path.abspath(self.path)))

    @property
    def compression(self) -> str:
        """ ".gz", ".zst", ".bz2", ".xz" or ""."""
        return self.path.suffix if self.path.suffix in COMPRESSIONS else ""

    @property
    def kind(self) -> str:
        """ ".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", or "" if the name does not say."""
        suffix = Path(self.path.name.removesuffix(self.compression)).suffix
        return suffix or ("." + self.given_format if self.given_format else "")


def is_text_file(name: str) -> bool:
    """Whether a file with this name can be read: one of `SUFFIXES`, or no suffix."""
    return name.endswith(SUFFIXES) or (not name.startswith(".") and TextFile(Path(name), name).kind == "")
