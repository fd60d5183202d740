"""One stream of batches whatever the number of workers, from any point on; and a fixed held-out list."""

import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from numbered_corpus import FIRST, MemoryCorpus, random_documents, segments_of, write_numbered

from fusebert.train.batches import loader
from fusebert.train.batches.loader import batches, heldout_batches
from fusebert.train.batches.pack import BatchShape, PackedExamples


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write_numbered(
        tmp_path_factory.mktemp("corpus") / "numbered", random_documents(rng, 20_000), random_documents(rng, 5_000)
    )


@pytest.fixture(scope="module")
def shape(corpus):
    return BatchShape.fit(corpus.split("train"), 1024, 64)


@pytest.fixture(scope="module")
def examples(corpus, shape):
    return PackedExamples(corpus, "train", shape, seed=1)


def sizes(shape):
    return shape.tokens, shape.segments, shape.masked, shape.seqlen


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert type(value) is type(other), name
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def take(count, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), count))


def test_the_stream_is_the_chunks_in_order_whatever_the_workers(examples):
    count = 3 * examples.batches_per_chunk + 2
    expected = [batch for index in range(4) for batch in examples[index]][:count]
    for num_workers in (0, 1, 2):
        assert_same(expected, take(count, examples, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_where_it_stopped(examples, num_workers):
    k = examples.batches_per_chunk
    assert k > 2
    expected = take(2 * k + 5, examples, num_workers=0)
    for start in (1, k - 1, k, k + 2, 2 * k + 1):
        assert_same(expected[start : start + 4], take(4, examples, num_workers=num_workers, start=start))


def test_the_stream_outlasts_an_epoch(examples):
    epoch = examples.chunks_per_epoch * examples.batches_per_chunk
    first, later = take(1, examples, num_workers=0), take(1, examples, num_workers=0, start=epoch)
    assert not torch.equal(first[0].input_ids, later[0].input_ids)


def test_taking_batches_leaves_torchs_generator_alone(examples):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        take(3, examples, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_batches_that_are_kept_hold_no_files_open(examples):
    stream = batches(examples, num_workers=1)
    kept = [next(stream)]
    before = len(os.listdir("/proc/self/fd"))
    kept += itertools.islice(stream, 5 * examples.batches_per_chunk)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("lanes", [1, 4, 6])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_one_stream_however_many_they_are(examples, lanes, num_workers):
    count = 3 * lanes * examples.batches_per_chunk + 24
    whole = take(count, examples, num_workers=0, lanes=lanes)
    assert len({tuple(batch.input_ids.tolist()) for batch in whole}) == count
    for start in (0, lanes * examples.batches_per_chunk + 12):
        for world_size in (2, 3, 4) if num_workers == 0 else (2,):
            for rank in range(world_size):
                mine = whole[start + rank :: world_size]
                options = {"rank": rank, "world_size": world_size, "lanes": lanes}
                shared = take(len(mine), examples, num_workers=num_workers, start=start, **options)
                assert_same(mine, shared)


def test_lanes_are_the_same_batches_in_another_order(examples):
    count = 4 * examples.batches_per_chunk
    one, four = (take(count, examples, num_workers=0, lanes=lanes) for lanes in (1, 4))
    assert_same(one, [four[4 * (i % (count // 4)) + i // (count // 4)] for i in range(count)])


@pytest.mark.parametrize(("world_size", "lanes", "made"), [(1, 4, 4), (2, 4, 2), (4, 4, 1), (2, 1, 1), (8, 4, 1)])
def test_a_rank_makes_the_chunks_of_its_lanes_alone(examples, monkeypatch, world_size, lanes, made):
    """In a block of ``lanes`` chunks; the first batch of the next block asks for one more."""
    asked = []
    original = PackedExamples.__getitem__
    monkeypatch.setattr(PackedExamples, "__getitem__", lambda self, i: asked.append(i) or original(self, i))
    count = lanes * examples.batches_per_chunk // world_size
    take(count, examples, num_workers=0, rank=world_size - 1, world_size=world_size, lanes=lanes)
    assert len(asked) == len(set(asked)) == made


class Failing(PackedExamples):
    def __getitem__(self, index):
        if index == 1:
            raise ValueError("chunk 1 is bad")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_raised_here(corpus, shape, num_workers):
    failing = Failing(corpus, "train", shape, seed=1)
    stream = batches(failing, num_workers=num_workers)
    for _ in range(failing.batches_per_chunk):
        next(stream)
    with pytest.raises(ValueError, match="chunk 1 is bad"):
        next(stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches_are_the_same_batches(examples, num_workers):
    pinned = take(3, examples, num_workers=num_workers, pin_memory=True)
    assert all(x.is_pinned() for batch in pinned for x in vars(batch).values() if isinstance(x, torch.Tensor))
    assert_same(pinned, take(3, examples, num_workers=0))


@pytest.mark.parametrize("argument", ["num_workers", "start"])
def test_negative_numbers_are_refused_at_once(examples, argument):
    with pytest.raises(ValueError, match=f"{argument} must not be negative; got -1"):
        batches(examples, **{"num_workers": 0, argument: -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\); got 2"),
        ({"rank": -1}, "rank must be in"),
        ({"lanes": 0}, "lanes must not be less than 1; got 0"),
    ],
)
def test_ranks_and_lanes_that_there_can_not_be(examples, options, message):
    with pytest.raises(ValueError, match=message):
        batches(examples, num_workers=0, **options)


@pytest.mark.parametrize("nsp", [True, False])
def test_heldout_batches_are_the_whole_split_once_under_fixed_masks(corpus, shape, nsp):
    one, two = (heldout_batches(corpus, shape, nsp=nsp) for _ in range(2))
    assert_same(one, two)
    seen = np.zeros(corpus.vocab_size, dtype=int)
    for batch in one:
        for segment in segments_of(batch, sizes(shape)):
            ids = [i for i in segment.a + segment.b if i >= FIRST]
            np.add.at(seen, ids, 1)
    n = corpus.split("heldout").num_tokens
    assert seen.max() == 1
    assert seen[FIRST : FIRST + n].sum() >= (0.99 if nsp else 1.0) * n
    assert (sum(batch.num_pairs for batch in one) > 0) == nsp
    other = heldout_batches(corpus, shape, nsp=nsp, seed=1)
    assert not torch.equal(one[0].input_ids, other[0].input_ids)


def test_heldout_batches_of_a_number_of_tokens(corpus, shape):
    some = heldout_batches(corpus, shape, tokens=2000)
    text = sum(len(s.a) + len(s.b) for batch in some for s in segments_of(batch, sizes(shape)))
    assert 1900 < text < 2000 + 8 * 64 + 64
    assert_same(heldout_batches(corpus, shape, tokens=10**9), heldout_batches(corpus, shape))
    for bad in (0, -5):
        with pytest.raises(ValueError, match="tokens must be positive"):
            heldout_batches(corpus, shape, tokens=bad)
    with pytest.raises(ValueError, match="seed must not be negative"):
        heldout_batches(corpus, shape, seed=-1)


def test_a_tiny_heldout_split_makes_one_batch(shape):
    (batch,) = heldout_batches(MemoryCorpus([[9, 8]]), shape)
    (segment,) = segments_of(batch, sizes(shape))
    assert segment.a + segment.b == list(range(FIRST, FIRST + 17))
    assert batch.num_tokens == 20
    assert batch.num_pairs == 0  # there is no other document
    assert batch.num_masked == 3


def test_everything_that_a_spawned_worker_needs_can_be_pickled(examples):
    for thing in (examples, loader._Chunk.collate, loader._start_worker):
        pickle.loads(pickle.dumps(thing))
