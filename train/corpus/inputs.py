"""The files of a text and their documents, which can be read several times, here and on other machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import UserError
from ..text.compression import Progress
from ..text.readers import read_documents
from ..text.reading import Reading
from ..text.text_file import TextFile


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of the text.

    Attributes:
        file: the file.
        version: of the file when the run started, see `TextFile.version`.
        heldout: its documents are held out.
        weight: how often an epoch has its documents.
        shared: it is read on another machine, where ``version`` is `TextFile.shared_version`.
    """

    file: TextFile
    version: tuple[Any, ...]
    heldout: bool = False
    weight: float = 1.0
    shared: bool = False

    def for_workers(self) -> Source:
        """The same file as other machines find it: in a folder that all share, or behind its URL."""
        return dataclasses.replace(
            self, file=self.file.absolute(), version=self.file.shared_version(self.version), shared=True
        )

    def check_version(self) -> None:
        """Raises UserError if the file has changed since the run started, and OSError if it has gone."""
        version = self.file.version()
        if self.shared:
            version = self.file.shared_version(version)
        if version != self.version:
            raise UserError(
                f"{self.file.name} has changed while it was read, and the text is read twice: start again when it is "
                "complete"
            )

    def documents(self, reading: Reading, progress: Progress | None = None) -> Iterator[str]:
        """The documents of the file, in order. See `read_documents` for the arguments.

        Raises:
            UserError: the file has changed, also while it was read to its end, or cannot be read.
            OSError: the file cannot be read.
        """
        self.check_version()
        yield from read_documents(self.file, reading, progress)
        self.check_version()


class Document(NamedTuple):
    """A document, whether it is from a file that is held out, and how often an epoch has it."""

    text: str
    heldout: bool
    weight: float


class Inputs:
    """The documents of some files, up to ``max_bytes`` of UTF-8 text; they can be read several times.

    Args:
        heldout_files: files of which all documents are held out. They are read first.
        files: the others.
        reading: how to read them.
        max_bytes: of text; None: all of it.
        weights: of files, by their keys; 1 for the others.

    Attributes:
        sources: the files.
        total_bytes: of the files.
        counts: documents of each file, by the last reading; of fewer files if ``max_bytes`` ended it.
        skipped, reasons: of the bad records of the last reading.
        too_long: bytes of the document that would have exceeded ``max_bytes``.
    """

    def __init__(
        self,
        heldout_files: list[TextFile],
        files: list[TextFile],
        reading: Reading,
        max_bytes: int | None,
        weights: dict[str, float],
    ) -> None:
        self.sources = [Source(file, file.version(), heldout=True) for file in heldout_files]
        self.sources += [Source(file, file.version(), weight=weights.get(file.key, 1.0)) for file in files]
        self.reading, self._max_bytes = reading, max_bytes
        self.total_bytes = sum(source.version[0] for source in self.sources)
        self.counts = list[int]()
        self.skipped, self.reasons = 0, list[str]()
        self.too_long: int | None = None

    def documents(self, progress: Progress) -> Iterator[Document]:
        """Every document, in order.

        Args:
            progress: called with the number of bytes read from disk (before decompression) since the last call.

        Raises:
            UserError: a file has changed since this object was made, or cannot be read.
            OSError: a file cannot be read.
        """
        left = self._max_bytes
        reading = self.reading.fresh()
        self.counts = []
        for source in self.sources:
            self.counts.append(0)
            for document in source.documents(reading, progress):
                if left is not None and (left := left - (size := len(document.encode()))) < 0:
                    source.check_version()
                    self.too_long = size
                    break
                self.counts[-1] += 1
                yield Document(document, source.heldout, source.weight)
            self.skipped, self.reasons = reading.skipped, reading.reasons
            if left is not None and left < 0:
                return
