"""The stream of batches does not depend on the number of workers or ranks, and can start anywhere."""

import itertools
import os
import subprocess
import sys

import numbered_corpus
import numpy as np
import pytest
import torch
from numbered_corpus import random_documents, same_batches, write_numbered

from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import PackedExamples
from fusebert.train.batches.loader import batches


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write_numbered(
        tmp_path_factory.mktemp("corpus") / "numbered", random_documents(rng, 20_000), random_documents(rng, 5_000)
    )


@pytest.fixture(scope="module")
def shape(corpus):
    return fit_shape(corpus.split("train"), 1024, 64)


@pytest.fixture(scope="module")
def examples(corpus, shape):
    return PackedExamples(BatchMaker(corpus, "train", shape), seed=1)


def take(count, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), count))


def test_the_stream_is_the_chunks_in_order_whatever_the_workers(examples):
    count = 3 * examples.batches_per_chunk + 2
    expected = [batch for index in range(4) for batch in examples[index]][:count]
    for num_workers in (0, 1, 2):
        assert same_batches(expected, take(count, examples, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_where_it_stopped(examples, num_workers):
    k = examples.batches_per_chunk
    assert k > 2
    expected = take(2 * k + 5, examples, num_workers=0)
    for start in (1, k - 1, k, k + 2, 2 * k + 1):
        assert same_batches(expected[start : start + 4], take(4, examples, num_workers=num_workers, start=start))


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
                assert same_batches(mine, shared)


def test_lanes_are_the_same_batches_in_another_order(examples):
    count = 4 * examples.batches_per_chunk
    one, four = (take(count, examples, num_workers=0, lanes=lanes) for lanes in (1, 4))
    assert same_batches(one, [four[4 * (i % (count // 4)) + i // (count // 4)] for i in range(count)])


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
    failing = Failing(BatchMaker(corpus, "train", shape), seed=1)
    stream = batches(failing, num_workers=num_workers)
    for _ in range(failing.batches_per_chunk):
        next(stream)
    with pytest.raises(ValueError, match="chunk 1 is bad"):
        next(stream)


def test_workers_do_not_keep_a_failing_process_alive():
    """An unexpected error keeps the stream alive until the interpreter exits."""
    program = """
import numpy, numbered_corpus
from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import PackedExamples
from fusebert.train.batches.loader import batches
corpus = numbered_corpus.MemoryCorpus(numbered_corpus.random_documents(numpy.random.default_rng(0), 9000))
maker = BatchMaker(corpus, "train", fit_shape(corpus.split("train"), 1024, 64))
stream = batches(PackedExamples(maker, seed=0), num_workers=2)
next(stream)
raise RuntimeError("unexpected")
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(numbered_corpus.__file__)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: unexpected\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches_are_the_same_batches(examples, num_workers):
    pinned = take(3, examples, num_workers=num_workers, pin_memory=True)
    assert all(x.is_pinned() for batch in pinned for x in vars(batch).values() if isinstance(x, torch.Tensor))
    assert same_batches(pinned, take(3, examples, num_workers=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\); got 2"),
        ({"rank": -1}, "rank must be in"),
        ({"lanes": 0}, "lanes must be at least 1; got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0; got -1"),
        ({"start": -1}, "start must be at least 0; got -1"),
    ],
)
def test_bad_arguments_are_refused_at_once(examples, options, message):
    with pytest.raises(ValueError, match=message):
        batches(examples, **{"num_workers": 0, **options})
