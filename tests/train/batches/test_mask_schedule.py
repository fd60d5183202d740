"""A share of masked tokens that falls during the run."""

import numpy as np
import pytest
from numbered_corpus import MemoryCorpus, random_documents

from fusebert.model.batch import IGNORE
from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import PackedExamples
from fusebert.train.batches.mask_schedule import mask_share, thin_masks


def test_the_share_falls_on_a_straight_line() -> None:
    assert [mask_share(0.3, 0.15, x) for x in (-1.0, 0.0, 0.5, 1.0, 2.0)] == pytest.approx(
        [0.3, 0.3, 0.225, 0.15, 0.15]
    )


def test_thinning_gives_tokens_back() -> None:
    corpus = MemoryCorpus(random_documents(np.random.default_rng(0), 4000))
    split = corpus.split("train")
    shape = fit_shape(split, 512, 64, mlm_probability=0.4)
    (batch, *_) = PackedExamples(BatchMaker(corpus, "train", shape, mlm_probability=0.4), seed=1)[0]
    # The text itself: all masks undone.
    original = thin_masks(batch, 0.0, np.random.default_rng(0))
    assert original.num_masked == 0
    assert (original.masked_labels == IGNORE).all()
    labelled = batch.masked_labels != IGNORE
    assert batch.input_ids[batch.masked_positions[labelled]].ne(batch.masked_labels[labelled]).any()
    assert original.input_ids[batch.masked_positions[labelled]].equal(batch.masked_labels[labelled])

    kept = 0
    for seed in range(40):
        thinned = thin_masks(batch, 0.25, np.random.default_rng(seed))
        stays = thinned.masked_labels != IGNORE
        kept += thinned.num_masked
        assert thinned.num_masked == stays.sum()
        assert (stays <= labelled).all()
        assert thinned.masked_positions[stays].equal(batch.masked_positions[stays])
        assert thinned.masked_labels[stays].equal(batch.masked_labels[stays])
        assert not thinned.masked_positions[~stays].any()
        expected = original.input_ids.clone()
        at = batch.masked_positions[stays]
        expected[at] = batch.input_ids[at]
        assert thinned.input_ids.equal(expected)
    total = 40 * batch.num_masked
    assert abs(kept - 0.25 * total) < 4 * (total * 0.25 * 0.75) ** 0.5

    whole = thin_masks(batch, 1.0, np.random.default_rng(0))
    assert whole.input_ids.equal(batch.input_ids)
    assert whole.num_masked == batch.num_masked


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_a_share_that_is_none(keep: float) -> None:
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\]"):
        thin_masks(None, keep, np.random.default_rng(0))  # type: ignore[arg-type]
