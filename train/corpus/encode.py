"""The second pass over the text, in worker processes: batches of documents to blocks of token ids.

Workers import this module and not the writer, which would load PyTorch in each of them.
"""

from __future__ import annotations

import collections
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..text.sentences import Splitter, sentence_splitter
from ..text.special_tokens import special_ids
from ..text.tokenizer import encoder, words_too_long
from .format import token_dtype


class Block(NamedTuple):
    """Documents of one split, with one weight.

    Attributes:
        split, tokens, sentence_lengths, document_lengths, weight: the arguments of `CorpusWriter.add_block`.
        unknown: how often each character occurs in the sentences that have an [UNK].
        long_words: words that are [UNK] for their length.
    """

    split: str
    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_lengths: np.ndarray
    weight: float
    unknown: dict[str, int]
    long_words: int


class Text(NamedTuple):
    """A document to encode.

    Attributes:
        split: "train" or "heldout".
        weight: how often an epoch has it.
        text: of the document.
    """

    split: str
    weight: float
    text: str


class Encoding(NamedTuple):
    """How text becomes token ids.

    Attributes:
        tokenizer_file: the tokenizer.json to encode with.
        sentences: the sentence splitter's name.
        vocab_size: V, which decides the dtype of the tokens.
    """

    tokenizer_file: Path
    sentences: str
    vocab_size: int


class _Loaded(NamedTuple):
    tokenizer: Tokenizer
    split_sentences: Splitter
    dtype: np.dtype[Any]
    unk: int


@functools.lru_cache(maxsize=4)  # a worker of a cluster may serve several runs at once
def _load(encoding: Encoding) -> _Loaded:
    tokenizer = encoder(encoding.tokenizer_file)
    return _Loaded(
        tokenizer,
        sentence_splitter(encoding.sentences),
        token_dtype(encoding.vocab_size),
        special_ids(tokenizer.get_vocab()).unk,
    )


def encode_documents(documents: list[Text], encoding: Encoding) -> list[Block]:
    """The blocks of ``documents``, one for each split and weight."""
    tokenizer, split_sentences, dtype, unk = _load(encoding)
    blocks = []
    for split, weight in sorted({(document.split, document.weight) for document in documents}):
        texts = [split_sentences(each.text) for each in documents if each[:2] == (split, weight)]
        sentences = list(itertools.chain.from_iterable(texts))
        ids = [e.ids for e in tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype)
        unknown: collections.Counter[str] = collections.Counter()
        long_words = 0
        if (tokens == unk).any():
            for sentence, pieces in zip(sentences, ids, strict=True):
                if unk in pieces:
                    unknown.update(sentence)
                    long_words += words_too_long(sentence, tokenizer)
        blocks.append(Block(split, tokens, _lengths(ids), _lengths(texts), weight, dict(unknown), long_words))
    return blocks


def _lengths(lists: list[list[Any]]) -> np.ndarray:
    return np.fromiter(map(len, lists), np.int32, len(lists))
