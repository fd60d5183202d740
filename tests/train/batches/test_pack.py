"""Packing examples into batches."""

import numpy as np
import pytest

from fusebert.train.batches.masking import num_to_mask
from fusebert.train.batches.pack import pack_examples
from fusebert.train.batches.shape import BatchShape


def test_packing_keeps_to_tight_bounds():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 65, size=600)
    masks = num_to_mask(lengths - 3, 0.15)
    tight = [BatchShape(512, segments, masked, 64) for segments, masked in ((16, 72), (10, 72), (40, 56), (40, 512))]
    for shape in tight:
        batches = pack_examples(lengths, masks, rng.permutation(600), shape)
        assert np.sort(np.concatenate(batches)).tolist() == list(range(600))
        for chosen in batches:
            used = int(lengths[chosen].sum())
            assert used <= 512
            assert len(chosen) + -(-(512 - used) // 64) <= shape.segments
            assert masks[chosen].sum() <= shape.masked
    assert np.mean([lengths[chosen].sum() for chosen in batches[:-1]]) > 511.9


def test_an_example_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="does not fit into an empty batch"):
        pack_examples(np.array([10, 10]), np.array([1, 1]), np.array([0, 1]), BatchShape(512, 8, 72, 64))
    with pytest.raises(ValueError, match="does not fit into an empty batch"):
        pack_examples(np.array([64]), np.array([9]), np.array([0]), BatchShape(512, 20, 8, 64))


def test_packing_takes_the_oldest_first():
    """No example waits for ever, even one that no other completes."""
    lengths = np.array([33] + [64] * 200)
    batches = pack_examples(lengths, np.ones(201, dtype=int), np.arange(201), BatchShape(64, 3, 8, 64))
    assert 0 in batches[0]
