"""The first pass over the text: chooses the held-out documents and the training sample of the tokenizer.

Two hashes of each document's text decide. So the choice does not depend on the order of the documents, and duplicates
of a document never lie in both splits.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from typing import NamedTuple

MIN_HELDOUT = 16  # documents
SAMPLE_DOCUMENTS = 1 << 18  # at most: a text of a few letters takes as much memory for its objects as one of 300


class Survey(NamedTuple):
    """The result of `survey_documents`.

    Attributes:
        num_documents: documents read.
        heldout_below: documents with a split hash below this are held out; None: there are not two different documents.
        sample: training documents for the tokenizer, with normalised spaces.
    """

    num_documents: int
    heldout_below: int | None
    sample: list[str]


def normalise_spaces(document: str) -> str:
    """The words of ``document``, separated by single spaces."""
    return " ".join(document.split())


def document_hashes(text: str, seed: int) -> tuple[int, int]:
    """(split hash, sample hash) of a document with normalised spaces, each uniform in [0, 2⁶⁴)."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def survey_documents(documents: Iterable[str], heldout: float, seed: int, sample_chars: int) -> Survey:
    """Surveys ``documents``, which are read once.

    Args:
        documents: any number; memory does not depend on it.
        heldout: fraction of the documents held out, in (0, 1). At least `MIN_HELDOUT` documents are, or a tenth of them
            if that is fewer, and at least one; at least one is not.
        seed: 0 … 2⁶⁴ − 1; the key of the hashes.
        sample_chars: size limit of the sample: the training documents with the smallest sample hashes, which is a
            uniform sample.
    """
    count, largest = 0, -1
    smallest: list[int] = []  # the MIN_HELDOUT smallest distinct split hashes, ascending
    sample: list[tuple[int, int, str]] = []  # heap of (−sample hash, split hash, text)
    sampled, rank_below = 0, 1 << 64
    for document in documents:
        text = normalise_spaces(document)
        side, rank = document_hashes(text, seed)
        count += 1
        largest = max(largest, side)
        if (len(smallest) < MIN_HELDOUT or side < smallest[-1]) and side not in smallest:
            smallest = sorted([*smallest, side])[:MIN_HELDOUT]
        if rank < rank_below:
            heapq.heappush(sample, (-rank, side, text))
            sampled += len(text)
            while sampled > sample_chars or len(sample) > SAMPLE_DOCUMENTS:
                # From now on skip all hashes above a dropped one, else the sample would depend on the order.
                dropped, _, text = heapq.heappop(sample)
                sampled, rank_below = sampled - len(text), -dropped
    if count == 0 or largest == smallest[0]:
        return Survey(count, None, [])
    least = min(MIN_HELDOUT, max(1, count // 10), len(smallest))
    # The document with the largest hash always stays in training.
    below = min(max(int(heldout * 2**64), smallest[least - 1] + 1), largest)
    return Survey(count, below, [text for _, side, text in sample if side >= below])
