"""Parts of a text for the second pass: consecutive documents, which one worker of a cluster reads and encodes.

Batches of documents end where parts end, on one machine as well, so that the blocks of a corpus are the same wherever
they are encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .encode import Text
from .inputs import Document
from .survey import HELDOUT, LEFT_OUT

PART_BYTES = 64 << 20  # half a minute of a core
_MOST_CUTS = 32  # a worker reads a file from its start: up to here that costs about a fifth of the encoding
LARGEST_PART_BYTES = 256 << 20  # its token ids, which a worker keeps until they are fetched, take half as much
_DOCUMENT_BYTES = 64  # a document counts as so many more, so that parts of tiny documents stay small
BATCH_CHARS = 1 << 19  # of the documents that a worker encodes at once
BATCH_DOCUMENTS = 1 << 13  # at most


class Piece(NamedTuple):
    """Consecutive documents of one file.

    Attributes:
        file: its number.
        first: number of the first document within the file.
        length: documents.
    """

    file: int
    first: int
    length: int


class Part(NamedTuple):
    """Consecutive documents of the text.

    Attributes:
        pieces: where they are, in order.
        first: number of the first document within the text.
        length: documents.
        too_large: so large a part of one file that it is read by the process that writes the corpus.
    """

    pieces: list[Piece]
    first: int
    length: int
    too_large: bool


def cut_parts(counts: Sequence[int], sizes: np.ndarray) -> list[Part]:
    """Cuts a text into parts of about `PART_BYTES`: files one after another, or parts of one larger file.

    Args:
        counts: documents of each file.
        sizes: integers [documents]: bytes of each document.
    """
    parts: list[Part] = []
    pieces: list[Piece] = []
    first = size = 0

    def end_part(too_large: bool = False) -> None:
        nonlocal pieces, size
        if pieces:
            length = sum(piece.length for piece in pieces)
            parts.append(Part(pieces, first - length, length, too_large))
        pieces, size = [], 0

    for file, count in enumerate(counts):
        ends = np.cumsum(sizes[first : first + count], dtype=np.int64)
        ends += _DOCUMENT_BYTES * np.arange(1, count + 1)
        total = int(ends[-1]) if count else 0
        if size + total > PART_BYTES:
            end_part()
        too_large = total > _MOST_CUTS * LARGEST_PART_BYTES
        cuts = 1 if too_large else min(-(-total // PART_BYTES), _MOST_CUTS)
        wanted = [total * cut // cuts for cut in range(1, cuts)]
        bounds = [0, *np.searchsorted(ends, wanted, side="right").tolist(), count]
        for start, stop in itertools.pairwise(bounds):
            if start == stop:
                continue
            pieces.append(Piece(file, start, stop - start))
            size += int(ends[stop - 1]) - (int(ends[start - 1]) if start else 0)
            first += stop - start
            if cuts > 1:
                end_part()
        if too_large:
            end_part(too_large)
    end_part()
    return parts


def batches(documents: Iterable[Document], places: np.ndarray) -> Iterator[list[Text]]:
    """Tasks of `encode_documents` from the documents of one part.

    Args:
        documents: at least as many as ``places``.
        places: uint8 [documents of the part]: `Survey.places`.
    """
    batch: list[Text] = []
    length = 0
    # The places first: zip takes one item of its first argument more than it needs.
    for place, document in zip(places.tolist(), documents, strict=False):
        if place == LEFT_OUT:
            continue
        batch.append(
            Text("heldout", 1.0, document.text) if place == HELDOUT else Text("train", document.weight, document.text)
        )
        length += len(document.text)
        if length >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def batches_of_parts(documents: Iterable[Document], places: np.ndarray, parts: Iterable[Part]) -> Iterator[list[Text]]:
    """The same for a text of several parts. The documents after the last part, if any, are read and left out: their
    file has grown, which is found at its end."""
    documents = iter(documents)
    for part in parts:
        yield from batches(documents, places[part.first : part.first + part.length])
    for _ in documents:
        pass
