"""The second pass over the text, in worker processes: batches of documents to blocks of token ids.

Workers import this module and not the writer, which would load PyTorch in each of them.
"""

from __future__ import annotations

import collections
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
    sentence_lengths: list[int]
    document_lengths: list[int]
    weight: float
    unknown: dict[str, int]
    long_words: int


class _Encoding(NamedTuple):
    tokenizer: Tokenizer
    split_sentences: Splitter
    dtype: np.dtype[Any]
    unk: int


_encoding: _Encoding  # set once per worker process


def start_encoding(tokenizer_file: Path, sentences: str, vocab_size: int) -> None:
    """Prepares this process for `encode_documents`.

    Args:
        tokenizer_file: the tokenizer.json to encode with.
        sentences: the sentence splitter's name.
        vocab_size: V, which decides the dtype of the tokens.
    """
    global _encoding
    tokenizer = encoder(tokenizer_file)
    _encoding = _Encoding(
        tokenizer, sentence_splitter(sentences), token_dtype(vocab_size), special_ids(tokenizer.get_vocab()).unk
    )


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


def encode_documents(documents: list[Text]) -> list[Block]:
    """The blocks of ``documents``, one for each split and weight. Call `start_encoding` first."""
    blocks = []
    for split, weight in sorted({(document.split, document.weight) for document in documents}):
        texts = [_encoding.split_sentences(each.text) for each in documents if each[:2] == (split, weight)]
        sentences = list(itertools.chain.from_iterable(texts))
        ids = [e.ids for e in _encoding.tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
        tokens = np.fromiter(itertools.chain.from_iterable(ids), _encoding.dtype)
        unknown: collections.Counter[str] = collections.Counter()
        long_words = 0
        if (tokens == _encoding.unk).any():
            for sentence, pieces in zip(sentences, ids, strict=True):
                if _encoding.unk in pieces:
                    unknown.update(sentence)
                    long_words += words_too_long(sentence, _encoding.tokenizer)
        blocks.append(
            Block(split, tokens, list(map(len, ids)), list(map(len, texts)), weight, dict(unknown), long_words)
        )
    return blocks
