"""Pairs really follow each other, or really do not; no text is lost; the label can't be read from the shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_corpus import FIRST, SPECIAL, MemoryCorpus, random_documents

from fusebert.model import IGNORE
from fusebert.train.batches.examples import EXCHANGED, IS_NEXT, NOT_NEXT, full_sentences, sentence_pairs
from fusebert.train.batches.passages import Passages

DOCUMENTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=10), min_size=1, max_size=15)


def pairs_of(documents, seqlen, seed):
    corpus = MemoryCorpus(documents)
    passages = Passages(corpus.split("train"), 8 * seqlen)
    rng = np.random.default_rng(seed)
    text = passages.read(rng.permutation(len(passages)))
    return corpus, text, sentence_pairs(text, seqlen, rng, corpus.continues_word)


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(5, 70), st.integers(0, 1000))
def test_pairs_are_what_their_label_says_and_use_every_token_once(documents, seqlen, seed):
    corpus, _, examples = pairs_of(documents, seqlen, seed)
    assert examples.lengths.max() <= seqlen
    assert examples.a_length.min() > 0
    used = np.zeros(corpus.vocab_size, dtype=int)
    for e in range(len(examples)):
        a = examples.tokens[examples.a_start[e] :][: examples.a_length[e]].astype(int)
        b = examples.tokens[examples.b_start[e] :][: examples.b_length[e]].astype(int)
        used[a] += 1
        used[b] += 1
        assert a.tolist() == list(range(a[0], a[0] + len(a)))
        if len(b) == 0:
            assert len(a) == 1
            assert examples.labels[e] == IGNORE
            continue
        assert b.tolist() == list(range(b[0], b[0] + len(b)))
        same_document = corpus.text.document_of[a[0] - FIRST] == corpus.text.document_of[b[0] - FIRST]
        follows = b[0] == a[-1] + 1
        assert (same_document and follows) if examples.labels[e] != NOT_NEXT else not same_document
    assert used.max() == 1
    assert (used[FIRST:] == 0).sum() == examples.trimmed
    if len(documents) == 1:
        assert set(examples.labels.tolist()) == {IGNORE}


def sentences_in(corpus, examples):
    """(A's, B's) number of sentences, whole or in part, of each example."""
    number = np.repeat(np.arange(corpus.text.shards[0].sentences.size - 1), np.diff(corpus.text.shards[0].sentences))
    ids = np.append(examples.tokens.astype(int), FIRST) - FIRST  # an empty B may begin at the end
    return tuple(
        number[ids[start + length - 1]] - number[ids[start]] + 1
        for start, length in ((examples.a_start, examples.a_length), (examples.b_start, examples.b_length))
    )


@pytest.fixture(scope="module")
def many_pairs():
    """Pairs of a corpus in which most documents are one sentence, over many seeds: (features, label)."""
    documents = random_documents(np.random.default_rng(3), 60_000, single=0.7)
    rows, trimmed, total = [], 0, 0
    for seed in range(12):
        corpus, _, examples = pairs_of(documents, 64, seed)
        a, b = sentences_in(corpus, examples)
        rows.append(np.stack([a, b, examples.a_length, examples.b_length, examples.labels]))
        trimmed += examples.trimmed
        total += corpus.text.num_tokens
    a, b, a_length, b_length, labels = np.concatenate(rows, axis=1)
    return (
        {
            "sentences of A": a,
            "sentences of B": b,
            "sentences": a + b,
            "A": a_length,
            "B": b_length,
            "length": a_length + b_length,
            "A and sentences": a_length // 4 * 100 + a + b,
        },
        labels,
        trimmed / total,
    )


def test_half_of_the_labels_are_is_next(many_pairs):
    _, labels, _ = many_pairs
    labelled = labels != IGNORE
    assert labelled.mean() > 0.95
    # Labels are drawn for two examples at once: the deviation of a mean is √2 that of independent draws.
    share = (labels[labelled] == IS_NEXT).mean()
    assert abs(share - 0.5) < 5 * 0.5 * np.sqrt(2 / labelled.sum())


@pytest.mark.parametrize(
    "feature", ["sentences of A", "sentences of B", "sentences", "A", "B", "length", "A and sentences"]
)
def test_the_label_can_not_be_read_from_the_shape(many_pairs, feature):
    """No value of the feature that is common enough to tell leans to a label by more than chance (5 deviations)."""
    features, labels, _ = many_pairs
    values, labels = features[feature][labels != IGNORE], labels[labels != IGNORE]
    tested = 0
    for value in np.unique(values):
        here = labels[values == value]
        if len(here) >= 100:
            tested += len(here)
            lean = (here == IS_NEXT).mean() - 0.5
            assert abs(lean) < 5 * 0.5 * np.sqrt(2 / len(here)), (feature, value, lean, len(here))
    assert tested > 0.7 * len(labels)


def test_hardly_any_text_is_trimmed(many_pairs):
    assert many_pairs[2] < 0.003


def test_lengths_of_a_and_b_are_the_same_for_both_labels():
    """Not only on the average: with B of another length taken away, exchanging B changes no shape at all."""
    documents = random_documents(np.random.default_rng(0), 40_000)
    _, _, examples = pairs_of(documents, 64, 0)
    matched = examples.labels != IGNORE
    _, counts = np.unique(examples.b_length[matched], return_counts=True)
    assert (counts % 2 == 0).all()
    starts = np.sort(np.concatenate([examples.a_start, examples.b_start[examples.b_length > 0]]))
    assert len(np.unique(starts)) == len(starts)


def test_a_broken_sentence_is_not_a_sign_of_either_label():
    """Where A ends inside a sentence, so does B begin inside one, be it the same or another."""
    _, text, examples = pairs_of(random_documents(np.random.default_rng(0), 40_000, single=0.5), 64, 0)
    borders = set(text.borders.tolist())
    whole_a = np.array([end in borders for end in (examples.a_start + examples.a_length).tolist()])
    whole_b = np.array([start in borders for start in examples.b_start.tolist()])
    other = examples.labels == NOT_NEXT
    assert np.array_equal(whole_a[other], whole_b[other])
    assert 0.1 < whole_a[other].mean() < 0.9


def test_documents_of_one_sentence_are_split_before_a_word():
    corpus, _, examples = pairs_of([[n] for n in range(12, 32)] * 10, 64, 0)
    assert set(examples.labels.tolist()) >= {IS_NEXT, NOT_NEXT}
    assert len(examples) >= 200
    follows = examples.labels != NOT_NEXT
    inside_word = corpus.continues_word[examples.tokens[examples.b_start[follows]]]
    # B begins inside a word only where A would be empty otherwise: A is part of that word.
    assert 0 < inside_word.mean() < 0.1
    assert examples.a_length[follows][inside_word].max() <= 2


def test_whole_sentences_are_kept_together():
    corpus, _, examples = pairs_of([[7] * 40, [9] * 40], 64, 1)
    ids = examples.tokens.astype(int) - FIRST
    borders = set(corpus.text.shards[0].sentences.tolist())
    assert all(ids[s] in borders for s in (*examples.a_start, *examples.b_start))


def test_a_tenth_of_the_spans_is_short():
    _, text, examples = pairs_of([[1] * 100_000, [1] * 100_000], 128, 0)
    follows = examples.labels != NOT_NEXT
    rest = ~np.isin((examples.a_start + examples.lengths - 3)[follows], text.ends)  # not what a passage has left
    lengths = examples.lengths[follows][rest]
    # The tenth is uniform over 5 … 128; trimming takes 15 tokens at most, so what is below 113 is of it.
    assert abs((lengths < 113).mean() - 0.1 * 108 / 124) < 5 * np.sqrt(0.09 / len(lengths))
    assert lengths.min() < 20


def full_of(documents, seqlen, seed):
    corpus = MemoryCorpus(documents)
    passages = Passages(corpus.split("train"), 8 * seqlen)
    text = passages.read(np.random.default_rng(seed).permutation(len(passages)), separator=SPECIAL.sep)
    return corpus, text, full_sentences(text, seqlen, corpus.continues_word)


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(5, 70), st.integers(0, 1000))
def test_full_sentences_are_the_text_in_order(documents, seqlen, seed):
    _, text, examples = full_of(documents, seqlen, seed)
    assert examples.lengths.max() <= seqlen
    assert set(examples.labels.tolist()) == {IGNORE}
    assert examples.b_length.sum() == 0
    joined = []
    for start, length in zip(examples.a_start, examples.a_length, strict=True):
        ids = examples.tokens[start : start + length].tolist()
        assert SPECIAL.sep not in (ids[0], ids[-1])
        # A separator stands between passages and nowhere else.
        inside = [start + i for i, token in enumerate(ids) if token == SPECIAL.sep]
        assert inside == [end for end in text.ends.tolist() if start <= end < start + length]
        joined += [token for token in ids if token != SPECIAL.sep]
    assert joined == [token for token in text.tokens.tolist() if token != SPECIAL.sep]


def test_full_sentences_are_full():
    """One sentence more would not have fitted."""
    _, text, examples = full_of(random_documents(np.random.default_rng(0), 20_000), 128, 0)
    end = (examples.a_start + examples.a_length)[:-1]
    next_border = text.borders[np.searchsorted(text.borders, end, side="right")]
    assert (next_border - examples.a_start[:-1] + 2).min() >= 128  # 128 where a separator was dropped in front
    assert examples.lengths.mean() > 100


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.integers(5, 70), st.integers(0, 1000))
def test_sentence_order(documents, seqlen, seed):
    corpus = MemoryCorpus(documents)
    passages = Passages(corpus.split("train"), 8 * seqlen)
    rng = np.random.default_rng(seed)
    text = passages.read(rng.permutation(len(passages)))
    examples = sentence_pairs(text, seqlen, rng, corpus.continues_word, sop=True)
    assert examples.lengths.max() <= seqlen
    used = np.zeros(corpus.vocab_size, dtype=int)
    ends = set(corpus.text.shards[0].sentences.tolist())
    for e in range(len(examples)):
        a = examples.tokens[examples.a_start[e] :][: examples.a_length[e]].astype(int)
        b = examples.tokens[examples.b_start[e] :][: examples.b_length[e]].astype(int)
        used[a] += 1
        used[b] += 1
        if len(b) == 0:
            assert examples.labels[e] == IGNORE
            continue
        first, second = (b, a) if examples.labels[e] == EXCHANGED else (a, b)
        assert first.tolist() == list(range(first[0], first[0] + len(first)))
        assert second.tolist() == list(range(first[-1] + 1, first[-1] + 1 + len(second)))
        assert (examples.labels[e] != IGNORE) == (second[0] - FIRST in ends)
    assert (used[FIRST:] == 1).all()  # nothing is cut off
    assert examples.trimmed == 0


def test_half_of_the_pairs_are_exchanged():
    corpus = MemoryCorpus(random_documents(np.random.default_rng(0), 40_000))
    passages = Passages(corpus.split("train"), 512)
    text = passages.read(np.arange(len(passages)))
    labels = sentence_pairs(text, 64, np.random.default_rng(1), corpus.continues_word, sop=True).labels
    labels = labels[labels != IGNORE]
    assert len(labels) > 100
    assert abs((labels == EXCHANGED).mean() - 0.5) < 4 * 0.5 / len(labels) ** 0.5
