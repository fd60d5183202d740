"""``fusebert summarize``: the sentences of a document that are nearest to all others in embedding space.

Sentence i with the unit vector e_i has the centrality Σ_j e_i·e_j = e_i·Σ_j e_j (degree centrality, Erkan & Radev 2004,
with the cosine as weight). The most central sentences, in the order of the document, are the summary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from ..errors import UserError
from ..text.files import find_files
from ..text.readers import read_documents
from ..text.reading import Reading
from ..text.sentences import sentence_splitter
from .embed import Embedder
from .rows import STDIN
from .settings import SummarizeSettings


def central_sentences(vectors: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: numbers of the most central of n sentences, increasing; all if there are fewer.

    Args:
        vectors: float32 [n, H], of length 1.
    """
    centrality = vectors @ vectors.sum(0)  # [n]
    return np.sort(np.argsort(-centrality, kind="stable")[:count])


def summarize(settings: SummarizeSettings) -> Iterator[list[str]]:
    """The summary of each document, a list of sentences. A document of over 64 Ki characters is several.

    Raises:
        UserError, ValueError: an option, the model or a file cannot be used.
    """
    if settings.sentences < 1:
        raise UserError(f"--sentences must be positive; got {settings.sentences}")
    split = sentence_splitter(settings.splitter)
    if settings.input == STDIN:
        documents = iter([sys.stdin.read()])
    else:
        (file,) = find_files([settings.input])
        documents = read_documents(file, Reading(settings.text_field))
    embedder = Embedder(settings, settings.pooling, normalize=True)
    for document in documents:
        sentences = list(dict.fromkeys(split(document)))
        if sentences:
            chosen = central_sentences(embedder(sentences), settings.sentences)
            yield [sentences[i] for i in chosen]
