"""The first pass over the text: decides which documents are held out, and samples the others.

A hash of each document's text decides both. So the choice does not depend on the order of the documents, and the copies
of a document lie in one split.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .documents import COPY_OF_HELDOUT, FIRST, DocumentTable
from .split import BIN_BITS, bin_of, choose_heldout
from .work_folder import DOCUMENTS

SAMPLE_DOCUMENTS = 1 << 18  # at most: a text of a few letters takes as much memory for its objects as one of 300
TRAIN, HELDOUT, LEFT_OUT = range(3)  # where a document goes


class Survey(NamedTuple):
    """The result of `survey_documents`.

    Attributes:
        places: uint8 [documents], in the order of the text: `TRAIN`, `HELDOUT` or `LEFT_OUT`.
        copies: for `TRAIN` and `HELDOUT`, how many documents in it have the text of an earlier one.
        dropped: copies that ``dedup`` left out.
        leaked: documents left out because they are in the files that are held out, too.
        sample: training documents for the tokenizer, with normalised spaces.
    """

    places: np.ndarray
    copies: dict[int, int]
    dropped: int
    leaked: int
    sample: list[str]


def normalise_spaces(document: str) -> str:
    """The words of ``document``, separated by single spaces."""
    return " ".join(document.split())


def document_digest(text: bytes, seed: int) -> bytes:
    """16 bytes: the split hash and the rank hash of a document with normalised spaces, each uniform in [0, 2⁶⁴)."""
    return hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, "little")).digest()


def survey_documents(
    documents: Iterable[tuple[str, bool]],
    heldout: float,
    seed: int,
    sample_chars: int,
    scratch: Path,
    *,
    dedup: bool = False,
) -> Survey:
    """Surveys ``documents``, which are read once.

    Args:
        documents: (text, whether it is from a file that is held out) of each; those of such files first. Any number;
            each takes two bytes of memory.
        heldout: share of the text to hold out, in (0, 1), by its bytes, if there is no file that is held out. At least
            one document is held out, and at least one is not, unless no two of them differ: then none is.
        seed: 0 … 2⁶⁴ − 1; the key of the hashes.
        sample_chars: size limit of the sample: the training documents with the smallest rank hashes, which is a uniform
            sample.
        scratch: folder for a file with 21 bytes for each document.
        dedup: leave out documents with the text of an earlier one.
    """
    table = DocumentTable(scratch / DOCUMENTS)
    sample: list[tuple[int, int, str]] = []  # heap of (−rank hash, number of the document, text)
    sampled, rank_below = 0, 1 << 64
    for number, (document, is_heldout) in enumerate(documents):
        text = normalise_spaces(document)
        data = text.encode()
        digest = document_digest(data, seed)
        table.add(digest, len(data), is_heldout)
        rank = int.from_bytes(digest[8:], "little")
        if rank < rank_below and not is_heldout:
            heapq.heappush(sample, (-rank, number, text))
            sampled += len(text)
            while sampled > sample_chars or len(sample) > SAMPLE_DOCUMENTS:
                # From now on skip all hashes above a dropped one, else the sample would depend on the order.
                dropped, _, text = heapq.heappop(sample)
                sampled, rank_below = sampled - len(text), -dropped
    table.close()
    copies = table.copies()
    places = _places(table, copies, heldout, dedup)
    left_out = places == LEFT_OUT
    leaked = int(np.count_nonzero(left_out & (copies == COPY_OF_HELDOUT) & ~table.heldout()))
    return Survey(
        places,
        {place: int(np.count_nonzero((copies != FIRST) & (places == place))) for place in (TRAIN, HELDOUT)},
        int(np.count_nonzero(left_out)) - leaked,
        leaked,
        [text for _, number, text in sample if places[number] == TRAIN],
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
