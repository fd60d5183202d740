"""Passages hold each token of a split once, in order, and can be read in any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_corpus import FIRST, MemorySplit

from fusebert.train.batches.passages import Passages, ranges

DOCUMENTS = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=12)


def test_ranges():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 4), st.integers(1, 100), st.randoms(use_true_random=False))
def test_passages_hold_every_token_once_in_order(documents, per_shard, max_tokens, random):
    split = MemorySplit(documents, per_shard)
    passages = Passages(split, max_tokens)
    assert passages.num_tokens == split.num_tokens
    assert passages.tokens.sum() <= split.num_tokens
    text = passages.read(np.arange(len(passages)))
    assert text.tokens.tolist() == list(range(FIRST, FIRST + split.num_tokens))
    assert text.starts.tolist() == [0, *text.ends[:-1].tolist()]
    lengths = text.ends - text.starts
    assert lengths.min() > 0
    assert lengths.max() < 2 * max_tokens
    assert np.array_equal(np.repeat(text.documents, lengths), split.document_of)

    # Borders are the sentence ends, and the passage ends.
    sentence_ends = set(np.cumsum([n for document in documents for n in document]).tolist())
    assert text.borders.tolist() == sorted({0} | sentence_ends | set(text.ends.tolist()))

    # Any other order is the same passages in that order; a separator after each moves the rest on.
    order = list(range(len(passages)))
    random.shuffle(order)
    shuffled = passages.read(np.array(order), separator=3)
    for p, start, end, document in zip(order, shuffled.starts, shuffled.ends, shuffled.documents, strict=True):
        assert np.array_equal(shuffled.tokens[start:end], text.tokens[text.starts[p] : text.ends[p]])
        assert shuffled.tokens[end] == 3
        assert document == text.documents[p]
        inside = shuffled.borders[(shuffled.borders > start) & (shuffled.borders <= end)] - start
        alone = text.borders[(text.borders > text.starts[p]) & (text.borders <= text.ends[p])] - text.starts[p]
        assert np.array_equal(inside, alone)


def test_long_documents_are_cut_at_sentence_borders():
    split = MemorySplit([[10] * 100, [10] * 100])
    text = Passages(split, 100).read(np.arange(20))
    assert text.starts.tolist() == list(range(0, 2000, 100))
    passages = Passages(split, 96)
    text = passages.read(np.arange(len(passages)))
    assert len(passages) == 22
    assert (text.starts % 10).tolist() == [0] * 22


def test_a_split_without_text_is_refused():
    with pytest.raises(ValueError, match="'heldout' has no text"):
        Passages(MemorySplit([], name="heldout"), 100)
