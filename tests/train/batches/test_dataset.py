"""The dataset of packed batches: well-formed batches that hold all text and depend on (seed, index) only."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_corpus import FIRST, SPECIAL, MemoryCorpus, random_documents, same_batches, segments_of

from fusebert.model import IGNORE
from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import SPARE, PackedExamples
from fusebert.train.batches.examples import NOT_NEXT
from fusebert.train.batches.masking import num_to_mask
from fusebert.train.batches.shape import BatchShape

DOCUMENTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=10), min_size=2, max_size=30)


def packed(corpus, shape, seed=0, **options):
    return PackedExamples(BatchMaker(corpus, "train", shape, **options), seed=seed)


@pytest.fixture(scope="module")
def corpus():
    return MemoryCorpus(random_documents(np.random.default_rng(0), 150_000), per_shard=500)


@settings(max_examples=60, deadline=None)
@given(
    DOCUMENTS,
    st.integers(5, 70),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_batch_is_well_formed_and_holds_the_text(documents, seqlen, times, nsp, whole_word, seed):
    corpus = MemoryCorpus(documents, per_shard=7)
    shape = fit_shape(corpus.split("train"), -(-seqlen * times // 8) * 8, seqlen, nsp=nsp)
    examples = packed(corpus, shape, seed=seed, nsp=nsp, whole_word=whole_word)
    document_of = corpus.text.document_of
    for index in range(min(2, examples.chunks_per_epoch)):
        batches = examples[index]
        assert len(batches) == examples.batches_per_chunk
        for batch in batches:
            assert batch.num_tokens > 0
            for segment in segments_of(batch, shape):
                a, b = segment.a, segment.b
                wanted = int(num_to_mask(np.array(sum(x >= FIRST for x in a + b)), 0.15))
                assert segment.num_masked <= wanted if whole_word else segment.num_masked == wanted
                if not nsp:
                    assert b == []
                    continue
                assert a == list(range(a[0], a[0] + len(a)))
                if b:
                    assert b == list(range(b[0], b[0] + len(b)))
                    other = document_of[a[0] - FIRST] != document_of[b[0] - FIRST]
                    assert other if segment.label == NOT_NEXT else b[0] == a[-1] + 1


@pytest.mark.parametrize("nsp", [True, False])
def test_an_epoch_holds_all_text_and_repeats_little_of_it(corpus, nsp):
    shape = fit_shape(corpus.split("train"), 4096, 128, nsp=nsp)
    examples = packed(corpus, shape, seed=0, nsp=nsp)
    assert examples.chunks_per_epoch > 1
    seen = np.zeros(corpus.vocab_size, dtype=int)
    for index in range(examples.chunks_per_epoch):
        for batch in examples[index]:
            for segment in segments_of(batch, shape):
                np.add.at(seen, segment.a + segment.b, 1)
    seen = seen[FIRST:]
    assert (seen == 0).sum() <= (0.003 if nsp else 0) * len(seen)  # pairs lose the trimmed ends of B
    # Repeated is what fills the spare batches: SPARE, less than one batch a chunk for rounding, and the slack.
    assert (seen > 1).mean() < SPARE + 1 / examples.batches_per_chunk + 0.01


def test_an_epoch_has_each_document_as_often_as_its_weight_says():
    weights = (1.0, 3.0, 1.5)
    documents = random_documents(np.random.default_rng(0), 60_000)
    corpus = MemoryCorpus(documents, per_shard=150, weights=weights)
    shape = fit_shape(corpus.split("train"), 4096, 128)
    examples, once = packed(corpus, shape), packed(MemoryCorpus(documents), shape)
    assert 1.5 < examples.batches_per_epoch / once.batches_per_epoch < 2.1
    seen = np.zeros(corpus.vocab_size, dtype=int)
    for index in range(2 * examples.chunks_per_epoch):  # two epochs
        for batch in examples[index]:
            for segment in segments_of(batch, shape):
                np.add.at(seen, segment.a + segment.b, 1)
                if segment.b and segment.label == NOT_NEXT:  # never two passages of one document
                    assert len(set(corpus.text.document_of[np.array(segment.a + segment.b) - FIRST])) > 1
    for i, shard in enumerate(corpus.text.shards):
        assert seen[shard.tokens].mean() == pytest.approx(2 * weights[i % 3], rel=0.08)


@pytest.mark.parametrize(("tokens", "seqlen"), [(4096, 128), (16384, 512)])
@pytest.mark.parametrize("nsp", [True, False])
def test_slack_is_below_one_percent(corpus, tokens, seqlen, nsp):
    shape = fit_shape(corpus.split("train"), tokens, seqlen, nsp=nsp)
    examples = packed(corpus, shape, seed=3, nsp=nsp)
    batches = [batch for index in range(3) for batch in examples[index]]
    slack = np.array([1 - batch.num_tokens / tokens for batch in batches])
    assert slack.mean() < 0.01
    if seqlen == 128:
        assert slack.max() < 0.01
    # M is close to what is used; a masked slot costs a row of the decoder.
    used = np.array([batch.num_masked for batch in batches])
    assert shape.masked - used.mean() < 8 + 0.02 * shape.masked
    pairs = np.array([batch.num_pairs for batch in batches]).sum()
    assert (pairs > 0.9 * sum(len(segments_of(b, shape)) for b in batches)) == nsp


def test_a_chunk_depends_on_seed_and_index_alone(corpus):
    shape = fit_shape(corpus.split("train"), 4096, 128)
    assert shape == fit_shape(corpus.split("train"), 4096, 128)
    one, two = (packed(corpus, shape, seed=5) for _ in range(2))
    last = one.chunks_per_epoch + 1
    expected = {index: one[index] for index in (0, 1, last)}
    copy = pickle.loads(pickle.dumps(two))
    for index in (last, 1, 0):
        for other in (two, copy):
            assert same_batches(expected[index], other[index])
    other_seed = packed(corpus, shape, seed=6)[0]
    assert not any(same_batches([a], [b]) for a, b in zip(expected[0], other_seed, strict=True))
    with pytest.raises(IndexError):
        one[-1]


def test_every_chunk_draws_anew_even_from_the_same_text():
    corpus = MemoryCorpus([[10] * 5] * 2)  # two passages, one chunk an epoch: order alone makes two chunks at most
    examples = packed(corpus, fit_shape(corpus.split("train"), 256, 64), seed=0)
    assert examples.chunks_per_epoch == 1
    assert len({tuple(examples[index][0].masked_labels.tolist()) for index in range(12)}) == 12


def test_each_epoch_has_other_pairs_and_masks(corpus):
    shape = fit_shape(corpus.split("train"), 4096, 128)
    examples = packed(corpus, shape, seed=5)
    masked = []
    for epoch in range(2):
        ids = np.zeros(corpus.vocab_size, dtype=bool)
        for index in range(examples.chunks_per_epoch):
            for batch in examples[epoch * examples.chunks_per_epoch + index]:
                ids[batch.masked_labels[: batch.num_masked].numpy()] = True
        masked.append(ids[FIRST:])
    # Drawn independently, a token is masked in both epochs with probability 0.15².
    assert abs((masked[0] & masked[1]).mean() - masked[0].mean() * masked[1].mean()) < 0.003


@pytest.mark.parametrize("tokens", [40, 300])
def test_a_corpus_smaller_than_a_batch_fills_it_with_repetitions(tokens):
    corpus = MemoryCorpus([[tokens // 20] * 5] * 4)
    shape = fit_shape(corpus.split("train"), 1024, 64)
    examples = packed(corpus, shape, seed=0)
    assert (examples.chunks_per_epoch, examples.batches_per_chunk) == (1, 1)
    (batch,) = examples[0]
    assert batch.num_tokens > 0.9 * 1024
    ids = {i for segment in segments_of(batch, shape) for i in segment.a + segment.b}
    assert len(ids) >= 0.95 * corpus.text.num_tokens


def test_a_dominant_document_leaves_its_pairs_without_labels():
    corpus = MemoryCorpus([[10] * 3000, [10] * 100])
    shape = fit_shape(corpus.split("train"), 4096, 64)
    examples = packed(corpus, shape, seed=0)
    labels = torch.cat([batch.nsp_labels for batch in examples[0]])
    assert 0 < (labels == NOT_NEXT).sum() < 0.1 * (labels == IGNORE).sum()


@pytest.mark.parametrize(
    ("documents", "change", "message"),
    [
        ([[5, 5]] * 4, {"mlm_probability": 0.0}, "mlm_probability must be between 0 and 1"),
        ([[5, 5]] * 4, {"mlm_probability": 1.0}, "mlm_probability must be between 0 and 1"),
        ([[5, 5]] * 4, {"mlm_probability": 0.9}, "masked must be at least 27"),
        ([[5, 5]] * 4, {"seed": -1}, "seed must not be negative"),
        ([[5, 5]], {}, "has one document.*--no-nsp"),
        ([], {}, "has no text"),
    ],
)
def test_bad_arguments_are_named(documents, change, message):
    with pytest.raises(ValueError, match=message):
        packed(MemoryCorpus(documents), BatchShape(256, 20, 24, 32), **change)
    if documents == [[5, 5]]:
        packed(MemoryCorpus(documents), BatchShape(256, 20, 24, 32), nsp=False)


def test_unknown_tokens_are_not_masked():
    corpus = MemoryCorpus([[10] * 10] * 50)
    for shard in corpus.text.shards:
        shard.tokens[::2] = SPECIAL.unk
    shape = fit_shape(corpus.split("train"), 512, 64)
    batch = packed(corpus, shape, seed=0)[0][0]
    assert batch.num_masked > 0
    assert SPECIAL.unk not in batch.masked_labels.tolist()
    segments_of(batch, shape)
