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

from .documents import DocumentTable
from .split import BIN_BITS, bin_of, choose_heldout
from .work_folder import DOCUMENTS

SAMPLE_DOCUMENTS = 1 << 18  # at most: a text of a few letters takes as much memory for its objects as one of 300
TRAIN, HELDOUT, LEFT_OUT = range(3)  # where a document goes


class Survey(NamedTuple):
    """The result of `survey_documents`.

    Attributes:
        places: uint8 [documents], in the order of the text: `TRAIN`, `HELDOUT` or `LEFT_OUT`.
        copies: for `TRAIN` and `HELDOUT`, how many documents in it have the text of an earlier one.
        sample: training documents for the tokenizer, with normalised spaces.
    """

    places: np.ndarray
    copies: dict[int, int]
    sample: list[str]


def normalise_spaces(document: str) -> str:
    """The words of ``document``, separated by single spaces."""
    return " ".join(document.split())


def document_digest(text: bytes, seed: int) -> bytes:
    """16 bytes: the split hash and the rank hash of a document with normalised spaces, each uniform in [0, 2⁶⁴)."""
    return hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, "little")).digest()


def survey_documents(documents: Iterable[str], heldout: float, seed: int, sample_chars: int, scratch: Path) -> Survey:
    """Surveys ``documents``, which are read once.

    Args:
        documents: any number; each takes a byte of memory.
        heldout: share of the text to hold out, in (0, 1), by its bytes. At least one document is held out, and at
            least one is not, unless no two of them differ: then none is.
        seed: 0 … 2⁶⁴ − 1; the key of the hashes.
        sample_chars: size limit of the sample: the training documents with the smallest rank hashes, which is a uniform
            sample.
        scratch: folder for a file with 20 bytes for each document.
    """
    table = DocumentTable(scratch / DOCUMENTS)
    sample: list[tuple[int, int, str]] = []  # heap of (−rank hash, number of the document, text)
    sampled, rank_below = 0, 1 << 64
    for number, document in enumerate(documents):
        text = normalise_spaces(document)
        data = text.encode()
        digest = document_digest(data, seed)
        table.add(digest, len(data))
        rank = int.from_bytes(digest[8:], "little")
        if rank < rank_below:
            heapq.heappush(sample, (-rank, number, text))
            sampled += len(text)
            while sampled > sample_chars or len(sample) > SAMPLE_DOCUMENTS:
                # From now on skip all hashes above a dropped one, else the sample would depend on the order.
                dropped, _, text = heapq.heappop(sample)
                sampled, rank_below = sampled - len(text), -dropped
    table.close()

    sizes = np.zeros(1 << BIN_BITS, dtype=np.int64)
    for _, rows in table.chunks():
        np.add.at(sizes, bin_of(rows["split_hash"]), rows["bytes"])
    heldout_bins = choose_heldout(sizes, heldout)
    places = np.empty(len(table), dtype=np.uint8)
    for where, rows in table.chunks():
        places[where] = np.where(heldout_bins[bin_of(rows["split_hash"])], HELDOUT, TRAIN)
    is_copy = table.copies()
    copies = {place: int(np.count_nonzero(is_copy & (places == place))) for place in (TRAIN, HELDOUT)}
    return Survey(places, copies, [text for _, number, text in sample if places[number] == TRAIN])
