"""The second pass over the text, in worker processes: batches of documents to blocks of token ids.

Workers import this module and not the writer, which would load PyTorch in each of them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..text.sentences import Splitter, sentence_splitter
from ..text.tokenizer import encoder
from .format import SPLITS, token_dtype
from .survey import document_hashes, normalise_spaces


class Block(NamedTuple):
    """Documents of one split: the arguments of `CorpusWriter.add_block`."""

    split: str
    tokens: np.ndarray
    sentence_lengths: list[int]
    document_lengths: list[int]


class _Encoding(NamedTuple):
    tokenizer: Tokenizer
    split_sentences: Splitter
    heldout_below: int
    seed: int
    dtype: np.dtype[Any]


_encoding: _Encoding  # set once per worker process


def start_encoding(tokenizer_file: Path, sentences: str, heldout_below: int, seed: int, vocab_size: int) -> None:
    """Prepares this process for `encode_documents`.

    Args:
        tokenizer_file: the tokenizer.json to encode with.
        sentences: the sentence splitter's name.
        heldout_below, seed: as in `survey_documents`.
        vocab_size: V, which decides the dtype of the tokens.
    """
    global _encoding
    splitter = sentence_splitter(sentences)
    _encoding = _Encoding(encoder(tokenizer_file), splitter, heldout_below, seed, token_dtype(vocab_size))


def encode_documents(documents: list[str]) -> list[Block]:
    """The blocks of ``documents``, one for each split. Call `start_encoding` first."""
    split_documents: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for document in documents:
        side, _ = document_hashes(normalise_spaces(document), _encoding.seed)
        split = "heldout" if side < _encoding.heldout_below else "train"
        split_documents[split].append(_encoding.split_sentences(document))
    blocks = []
    for split, texts in split_documents.items():
        sentences = list(itertools.chain.from_iterable(texts))
        ids = [e.ids for e in _encoding.tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
        tokens = np.fromiter(itertools.chain.from_iterable(ids), _encoding.dtype)
        blocks.append(Block(split, tokens, list(map(len, ids)), list(map(len, texts))))
    return blocks
