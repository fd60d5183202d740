"""Batches of constant shape that hold a chunk's text, and a dataset of them that depends on (seed, index) alone."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_corpus import FIRST, SPECIAL, MemoryCorpus, random_documents, segments_of

from fusebert.model import IGNORE
from fusebert.train.batches.examples import NOT_NEXT
from fusebert.train.batches.masking import num_to_mask
from fusebert.train.batches.pack import SPARE, BatchShape, PackedExamples, pack

DOCUMENTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=10), min_size=2, max_size=30)


def sizes(shape):
    return shape.tokens, shape.segments, shape.masked, shape.seqlen


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


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
    shape = BatchShape.fit(corpus.split("train"), -(-seqlen * times // 8) * 8, seqlen, nsp=nsp)
    examples = PackedExamples(corpus, "train", shape, seed=seed, nsp=nsp, whole_word=whole_word)
    document_of = corpus.text.document_of
    for index in range(min(2, examples.chunks_per_epoch)):
        batches = examples[index]
        assert len(batches) == examples.batches_per_chunk
        for batch in batches:
            assert batch.num_tokens > 0
            for segment in segments_of(batch, sizes(shape)):
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
    shape = BatchShape.fit(corpus.split("train"), 4096, 128, nsp=nsp)
    examples = PackedExamples(corpus, "train", shape, seed=0, nsp=nsp)
    assert examples.chunks_per_epoch > 1
    seen, lost, text = np.zeros(corpus.vocab_size, dtype=int), 0, 0
    for index in range(examples.chunks_per_epoch):
        for batch in examples[index]:
            for segment in segments_of(batch, sizes(shape)):
                np.add.at(seen, segment.a + segment.b, 1)
        chunk_lost, chunk_text = examples.lost_tokens(index)
        lost, text = lost + chunk_lost, text + chunk_text
    seen = seen[FIRST:]
    assert (seen == 0).sum() == lost
    assert lost <= (0.003 if nsp else 0) * len(seen)
    assert text >= len(seen)
    # Repeated is what fills the spare batches: SPARE, less than one batch a chunk for rounding, and the slack.
    assert (seen > 1).mean() < SPARE + 1 / examples.batches_per_chunk + 0.01


@pytest.mark.parametrize(("tokens", "seqlen"), [(4096, 128), (16384, 512)])
@pytest.mark.parametrize("nsp", [True, False])
def test_slack_is_below_one_percent(corpus, tokens, seqlen, nsp):
    shape = BatchShape.fit(corpus.split("train"), tokens, seqlen, nsp=nsp)
    examples = PackedExamples(corpus, "train", shape, seed=3, nsp=nsp)
    batches = [batch for index in range(3) for batch in examples[index]]
    slack = np.array([1 - batch.num_tokens / tokens for batch in batches])
    assert slack.mean() < 0.01
    if seqlen == 128:
        assert slack.max() < 0.01
    # M is close to what is used; a masked slot costs a row of the decoder.
    used = np.array([batch.num_masked for batch in batches])
    assert shape.masked - used.mean() < 8 + 0.02 * shape.masked
    pairs = np.array([batch.num_pairs for batch in batches]).sum()
    assert (pairs > 0.9 * sum(len(segments_of(b, sizes(shape))) for b in batches)) == nsp


def test_packing_keeps_to_tight_bounds():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 65, size=600)
    masks = num_to_mask(lengths - 3, 0.15)
    tight = [BatchShape(512, segments, masked, 64) for segments, masked in ((16, 72), (10, 72), (40, 56), (40, 512))]
    for shape in tight:
        batches = pack(lengths, masks, rng.permutation(600), shape)
        assert np.sort(np.concatenate(batches)).tolist() == list(range(600))
        for chosen in batches:
            used = int(lengths[chosen].sum())
            assert used <= 512
            assert len(chosen) + -(-(512 - used) // 64) <= shape.segments
            assert masks[chosen].sum() <= shape.masked
    assert np.mean([lengths[chosen].sum() for chosen in batches[:-1]]) > 511.9


def test_an_example_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="doesn't fit into an empty batch"):
        pack(np.array([10, 10]), np.array([1, 1]), np.array([0, 1]), BatchShape(512, 8, 72, 64))
    with pytest.raises(ValueError, match="doesn't fit into an empty batch"):
        pack(np.array([64]), np.array([9]), np.array([0]), BatchShape(512, 20, 8, 64))


def test_packing_takes_the_oldest_first():
    """No example waits for ever, even one that no other completes."""
    lengths = np.array([33] + [64] * 200)
    batches = pack(lengths, np.ones(201, dtype=int), np.arange(201), BatchShape(64, 3, 8, 64))
    assert 0 in batches[0]


def test_a_chunk_depends_on_seed_and_index_alone(corpus):
    shape = BatchShape.fit(corpus.split("train"), 4096, 128)
    assert shape == BatchShape.fit(corpus.split("train"), 4096, 128)
    one, two = (PackedExamples(corpus, "train", shape, seed=5) for _ in range(2))
    last = one.chunks_per_epoch + 1
    expected = {index: one[index] for index in (0, 1, last)}
    copy = pickle.loads(pickle.dumps(two))
    for index in (last, 1, 0):
        for other in (two, copy):
            assert all(same(a, b) for a, b in zip(expected[index], other[index], strict=True))
    other_seed = PackedExamples(corpus, "train", shape, seed=6)[0]
    assert not any(same(a, b) for a, b in zip(expected[0], other_seed, strict=True))
    with pytest.raises(IndexError):
        one[-1]


def test_every_chunk_draws_anew_even_from_the_same_text():
    corpus = MemoryCorpus([[10] * 5] * 2)  # two passages, one chunk an epoch: order alone makes two chunks at most
    examples = PackedExamples(corpus, "train", BatchShape.fit(corpus.split("train"), 256, 64), seed=0)
    assert examples.chunks_per_epoch == 1
    assert len({tuple(examples[index][0].masked_labels.tolist()) for index in range(12)}) == 12


def test_each_epoch_has_other_pairs_and_masks(corpus):
    shape = BatchShape.fit(corpus.split("train"), 4096, 128)
    examples = PackedExamples(corpus, "train", shape, seed=5)
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
    shape = BatchShape.fit(corpus.split("train"), 1024, 64)
    examples = PackedExamples(corpus, "train", shape, seed=0)
    assert (examples.chunks_per_epoch, examples.batches_per_chunk) == (1, 1)
    (batch,) = examples[0]
    assert batch.num_tokens > 0.9 * 1024
    ids = {i for segment in segments_of(batch, sizes(shape)) for i in segment.a + segment.b}
    assert len(ids) == corpus.text.num_tokens - examples.lost_tokens(0)[0]


def test_a_dominant_document_leaves_its_pairs_without_labels():
    corpus = MemoryCorpus([[10] * 3000, [10] * 100])
    shape = BatchShape.fit(corpus.split("train"), 4096, 64)
    examples = PackedExamples(corpus, "train", shape, seed=0)
    labels = torch.cat([batch.nsp_labels for batch in examples[0]])
    assert 0 < (labels == NOT_NEXT).sum() < 0.1 * (labels == IGNORE).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen": 4}, "seqlen must be at least 5"),
        ({"tokens": 64}, "tokens must be at least seqlen, 128"),
        ({"tokens": 1028}, "tokens must be a multiple of 8"),
        ({"masked": 150}, "masked must be a multiple of 8"),
        ({"masked": 0}, "masked must be a positive integer"),
        ({"segments": 7}, "segments must be at least 8"),
        ({"tokens": 1024.0}, "tokens must be a positive integer"),
    ],
)
def test_bad_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BatchShape(**{"tokens": 1024, "segments": 20, "masked": 160, "seqlen": 128, **change})


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
        PackedExamples(MemoryCorpus(documents), "train", BatchShape(256, 20, 24, 32), **{"seed": 0, **change})
    if documents == [[5, 5]]:
        PackedExamples(MemoryCorpus(documents), "train", BatchShape(256, 20, 24, 32), seed=0, nsp=False)


def test_unknown_tokens_are_not_masked():
    corpus = MemoryCorpus([[10] * 10] * 50)
    for shard in corpus.text.shards:
        shard.tokens[::2] = SPECIAL.unk
    shape = BatchShape.fit(corpus.split("train"), 512, 64)
    batch = PackedExamples(corpus, "train", shape, seed=0)[0][0]
    assert batch.num_masked > 0
    assert SPECIAL.unk not in batch.masked_labels.tolist()
    segments_of(batch, sizes(shape))
