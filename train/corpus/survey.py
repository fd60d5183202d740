"""The first pass over the text: decides which documents are held out, and samples the others.

A hash of each document's text decides both. So the choice does not depend on the order of the documents, and the copies
of a document lie in one split. Parts of the text can be surveyed on several machines (`survey_part`) and put together
in order (`Surveyor.add_part`): the result is that of one machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .documents import COPY_OF_HELDOUT, FIRST, DocumentTable, table_row
from .split import BIN_BITS, bin_of, choose_heldout
from .work_folder import DOCUMENTS

SAMPLE_DOCUMENTS = 1 << 18  # at most: a text of a few letters takes as much memory for its objects as one of 300
TRAIN, HELDOUT, LEFT_OUT = range(3)  # where a document goes
ANY_RANK = 1 << 64  # above all rank hashes


class Survey(NamedTuple):
    """The result of the first pass.

    Attributes:
        places: uint8 [documents], in the order of the text: `TRAIN`, `HELDOUT` or `LEFT_OUT`.
        sizes: uint32 [documents]: bytes of each, with normalised spaces.
        copies: for `TRAIN` and `HELDOUT`, how many documents in it have the text of an earlier one.
        dropped: copies that ``dedup`` left out.
        leaked: documents left out because they are in the files that are held out, too.
        sample: training documents for the tokenizer, with normalised spaces.
    """

    places: np.ndarray
    sizes: np.ndarray
    copies: dict[int, int]
    dropped: int
    leaked: int
    sample: list[str]


class SurveyPart(NamedTuple):
    """What `survey_part` found in a part of the text.

    Attributes:
        rows: of the `DocumentTable`.
        sample: (rank hash, number in this part, text) of documents that the sample may have.
    """

    rows: bytes
    sample: list[tuple[int, int, str]]


def normalise_spaces(document: str) -> str:
    """The words of ``document``, separated by single spaces."""
    return " ".join(document.split())


def document_digest(text: bytes, seed: int) -> bytes:
    """16 bytes: the split hash and the rank hash of a document with normalised spaces, each uniform in [0, 2⁶⁴)."""
    return hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, "little")).digest()


class _Sample:
    """The documents with the smallest rank hashes, as many as fit: a uniform sample of the text.

    Copies have one rank hash; the first ones of these fit. So the sample of a text does not depend on its order, and is
    that of the samples of its parts. Offer documents in the order of the text.

    Args:
        chars: of all documents, at most.
        rank_below: leave out documents from this rank hash on.
    """

    def __init__(self, chars: int, rank_below: int = ANY_RANK) -> None:
        self._left = chars
        self._heap: list[tuple[int, int, str]] = []  # (−rank hash, −number, text): the next one to drop is the first
        self.rank_below = rank_below

    def offer(self, rank: int, number: int, text: str) -> None:
        """Adds a document if it fits, in place of those with larger hashes."""
        if rank >= self.rank_below:
            return
        heapq.heappush(self._heap, (-rank, -number, text))
        self._left -= len(text)
        while self._left < 0 or len(self._heap) > SAMPLE_DOCUMENTS:
            dropped, _, text = heapq.heappop(self._heap)
            self._left += len(text)
            self.rank_below = -dropped  # a smaller document must not take the place of one that was dropped

    def documents(self) -> list[tuple[int, int, str]]:
        """(rank hash, number, text) of each, sorted."""
        return sorted((-rank, -number, text) for rank, number, text in self._heap)


def survey_part(
    documents: Iterable[tuple[str, bool]], seed: int, sample_chars: int, rank_below: int = ANY_RANK
) -> SurveyPart:
    """Surveys a part of the text: the arguments are those of `Surveyor`.

    Args:
        documents: (text, whether it is from a file that is held out) of each.
        rank_below: documents with larger rank hashes are not in the sample, see `Surveyor.rank_below`.
    """
    rows, sample = bytearray(), _Sample(sample_chars, rank_below)
    for number, (document, heldout) in enumerate(documents):
        rows += _look(sample, number, document, heldout, seed)
    return SurveyPart(bytes(rows), sample.documents())


def _look(sample: _Sample, number: int, document: str, heldout: bool, seed: int) -> bytes:
    """The row of a document, which is offered to the sample."""
    text = normalise_spaces(document)
    data = text.encode()
    digest = document_digest(data, seed)
    if not heldout:
        sample.offer(int.from_bytes(digest[8:], "little"), number, text)
    return table_row(digest, len(data), heldout)


class Surveyor:
    """Surveys a text, document by document (`add`) or part by part (`add_part`), in its order.

    Args:
        scratch: folder for a file with 21 bytes for each document.
        seed: 0 … 2⁶⁴ − 1; the key of the hashes.
        sample_chars: size limit of the sample: the training documents with the smallest rank hashes, which is a uniform
            sample.
    """

    def __init__(self, scratch: Path, seed: int, sample_chars: int) -> None:
        self._table = DocumentTable(scratch / DOCUMENTS)
        self._sample = _Sample(sample_chars)
        self._seed, self.sample_chars = seed, sample_chars
        self._number = 0

    @property
    def rank_below(self) -> int:
        """The documents still to come are in the sample only if their rank hashes are smaller than this."""
        return self._sample.rank_below

    def add(self, documents: Iterable[tuple[str, bool]]) -> None:
        """Surveys documents: (text, whether it is from a file that is held out) of each; those of such files first."""
        for document, heldout in documents:
            self._table.add(_look(self._sample, self._number, document, heldout, self._seed))
            self._number += 1

    def add_part(self, part: SurveyPart) -> None:
        """Adds what `survey_part` found with the same seed and at least as large a sample."""
        self._table.add(part.rows)
        for rank, number, text in part.sample:
            self._sample.offer(rank, self._number + number, text)
        self._number += len(part.rows) // DocumentTable.ROW_BYTES

    def finish(self, heldout: float, dedup: bool = False) -> Survey:
        """The survey of all documents. Each takes two bytes of memory.

        Args:
            heldout: share of the text to hold out, in (0, 1), by its bytes, if there is no file that is held out. At
                least one document is held out, and at least one is not, unless no two of them differ: then none is.
            dedup: leave out documents with the text of an earlier one.
        """
        table = self._table
        table.close()
        copies = table.copies()
        places = _places(table, copies, heldout, dedup)
        left_out = places == LEFT_OUT
        leaked = int(np.count_nonzero(left_out & (copies == COPY_OF_HELDOUT) & ~table.heldout()))
        return Survey(
            places,
            table.sizes(),
            {place: int(np.count_nonzero((copies != FIRST) & (places == place))) for place in (TRAIN, HELDOUT)},
            int(np.count_nonzero(left_out)) - leaked,
            leaked,
            [text for _, number, text in self._sample.documents() if places[number] == TRAIN],
        )


def _places(table: DocumentTable, copies: np.ndarray, heldout: float, dedup: bool) -> np.ndarray:
    places = np.full(len(table), TRAIN, dtype=np.uint8)
    from_files = table.heldout()
    if from_files.any():
        places[from_files] = HELDOUT
        places[~from_files & (copies == COPY_OF_HELDOUT)] = LEFT_OUT
    else:
        sizes = np.zeros(1 << BIN_BITS, dtype=np.int64)
        for where, rows in table.chunks():
            counted = (copies[where] == FIRST) if dedup else np.ones(len(rows), dtype=bool)
            np.add.at(sizes, bin_of(rows["split_hash"][counted]), rows["bytes"][counted])
        heldout_bins = choose_heldout(sizes, heldout)
        for where, rows in table.chunks():
            places[where][heldout_bins[bin_of(rows["split_hash"])]] = HELDOUT
    if dedup:
        places[copies != FIRST] = LEFT_OUT
    return places
