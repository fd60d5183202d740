"""The fixed list of held-out batches."""

import numpy as np
import pytest
import torch
from numbered_corpus import FIRST, MemoryCorpus, random_documents, same_batches, segments_of

from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import heldout_batches


@pytest.fixture(scope="module")
def corpus():
    return MemoryCorpus(random_documents(np.random.default_rng(1), 5_000))


@pytest.fixture(scope="module")
def shape(corpus):
    return fit_shape(corpus.split("train"), 1024, 64)


@pytest.mark.parametrize("nsp", [True, False])
def test_heldout_batches_are_the_whole_split_once_under_fixed_masks(corpus, shape, nsp):
    maker = BatchMaker(corpus, "heldout", shape, nsp=nsp)
    one, two = (heldout_batches(maker) for _ in range(2))
    assert same_batches(one, two)
    seen = np.zeros(corpus.vocab_size, dtype=int)
    for batch in one:
        for segment in segments_of(batch, shape):
            ids = [i for i in segment.a + segment.b if i >= FIRST]
            np.add.at(seen, ids, 1)
    n = corpus.split("heldout").num_tokens
    assert seen.max() == 1
    assert seen[FIRST : FIRST + n].sum() >= (0.99 if nsp else 1.0) * n
    assert (sum(batch.num_pairs for batch in one) > 0) == nsp
    other = heldout_batches(maker, seed=1)
    assert not torch.equal(one[0].input_ids, other[0].input_ids)


def test_heldout_batches_of_a_number_of_tokens(corpus, shape):
    maker = BatchMaker(corpus, "heldout", shape)
    some = heldout_batches(maker, tokens=2000)
    text = sum(len(s.a) + len(s.b) for batch in some for s in segments_of(batch, shape))
    assert 1900 < text < 2000 + 8 * 64 + 64
    assert same_batches(heldout_batches(maker, tokens=10**9), heldout_batches(maker))
    for bad in (0, -5):
        with pytest.raises(ValueError, match="tokens must be positive"):
            heldout_batches(maker, tokens=bad)
    with pytest.raises(ValueError, match="seed must not be negative"):
        heldout_batches(maker, seed=-1)


def test_a_tiny_heldout_split_makes_one_batch(shape):
    (batch,) = heldout_batches(BatchMaker(MemoryCorpus([[9, 8]]), "heldout", shape))
    (segment,) = segments_of(batch, shape)
    assert segment.a + segment.b == list(range(FIRST, FIRST + 17))
    assert batch.num_tokens == 20
    assert batch.num_pairs == 0  # there is no other document
    assert batch.num_masked == 3
