"""The held-out part: of the size that was asked for whenever the documents allow it, copies on one side."""

import itertools
import os
import random

import numpy as np
import pytest

from fusebert.train.corpus.documents import COPY, FIRST, DocumentTable, table_row
from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.corpus.split import BIN_BITS, choose_heldout

WORDS = ["long", "book", "has", "many", "words", "and", "each", "of", "its", "chapters", "is", "another", "text"]


def held_out(weights, share, rng):
    """The weights that are held out, in bins drawn at random."""
    sizes = np.zeros(1 << BIN_BITS, dtype=np.int64)
    bins = np.unique(rng.integers(len(sizes), size=2 * len(weights)))
    bins = rng.permutation(bins)[: len(weights)]
    sizes[bins] = weights
    chosen = np.flatnonzero(choose_heldout(sizes, share))
    assert np.isin(chosen, bins).all()
    return sizes[chosen]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.5], ids=["equal", "ragged", "heavy tail"])
def test_many_documents_give_the_size_that_is_asked_for(share, sigma):
    rng = np.random.default_rng(0)
    weights = (1000 * rng.lognormal(0, sigma, 3000)).astype(np.int64) + 1
    assert held_out(weights, share, rng).sum() == pytest.approx(share * weights.sum(), rel=0.05)


def test_small_documents_beside_one_that_is_larger_than_all_that_is_wanted():
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = np.array([70_000] + [100] * 300)
        assert held_out(weights, 0.1, rng).sum() == pytest.approx(10_000, rel=0.05)


def test_whenever_some_documents_have_the_size_such_documents_are_found():
    rng = np.random.default_rng(0)
    possible = 0
    for _ in range(200):
        weights = rng.integers(1, 10_000, rng.integers(2, 10))
        share = rng.uniform(0.05, 0.6)
        wanted = share * weights.sum()
        sums = [sum(s) for n in range(1, len(weights)) for s in itertools.combinations(weights.tolist(), n)]
        nearest = min(abs(s - wanted) for s in sums)
        found = held_out(weights, share, rng)
        assert 0 < len(found) < len(weights)
        if nearest <= 0.09 * wanted:  # sums are rounded to a thousandth
            possible += 1
            assert abs(found.sum() - wanted) <= 0.1 * wanted
        else:
            assert abs(found.sum() - wanted) <= nearest + 0.02 * wanted
    assert possible > 100


@pytest.mark.parametrize("seed", range(2))
def test_ten_copies_of_a_file(tmp_path, seed):
    rng = random.Random(seed)
    chapters = [" ".join(rng.choices(WORDS, k=rng.randint(100, 1000))) for _ in range(20)]
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(chapters))
    made = prepare(PrepareSettings(tmp_path / "out", [str(tmp_path)], heldout=0.1, seed=seed, vocab_size=80, workers=1))
    tokens = [made.split(name).num_tokens for name in ("heldout", "train")]
    assert tokens[0] / sum(tokens) == pytest.approx(0.1, rel=0.1)
    texts = {}
    for name in ("heldout", "train"):
        for shard in made.split(name).shards:
            bounds = shard.sentences[shard.documents]
            texts[name] = [tuple(shard.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    assert len(set(texts["heldout"])) * 10 == len(texts["heldout"])
    assert not set(texts["heldout"]) & set(texts["train"])
    assert made.manifest["report"]["splits"]["train"]["duplicate_share"] == 0.9


def test_a_size_that_no_documents_have_is_warned_of(tmp_path):
    (tmp_path / "a.txt").write_text("One short document.\n\nAnd another one, which is a little longer.")
    with pytest.warns(UserWarning, match=r"% of the text is held out, not the 1.00% of --heldout, .* 2 documents"):
        prepare(PrepareSettings(tmp_path / "out", [str(tmp_path / "a.txt")], vocab_size=60))


@pytest.mark.parametrize("part_rows", [7, 1 << 22])
def test_copies_are_found_in_parts(tmp_path, part_rows):
    rng = random.Random(0)
    digests = [os.urandom(16) for _ in range(40)]
    drawn = rng.choices(digests, k=100)
    table = DocumentTable(tmp_path / "table")
    for digest in drawn:
        table.add(table_row(digest, 1, False))
    table.close()
    wanted = [COPY if digest in drawn[:i] else FIRST for i, digest in enumerate(drawn)]
    assert table.copies(part_rows).tolist() == wanted
