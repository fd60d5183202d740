"""How many tokens are masked, which, and what becomes of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_corpus import FIRST, SPECIAL, continues_word

from fusebert.train.batches.masking import Masker, num_to_mask

VOCAB = 1000


def masker(probability=0.15, whole_word=False):
    return Masker(SPECIAL, SPECIAL.mask, VOCAB, probability, continues_word(VOCAB) if whole_word else None)


def some_text(lengths, seed):
    """Segments [CLS] … [SEP] … [UNK] … of the given lengths with a fifth of special tokens: ids, segment."""
    rng = np.random.default_rng(seed)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    ids = rng.integers(FIRST, VOCAB, size=len(segment))
    special = rng.random(len(ids)) < 0.2
    ids[special] = rng.integers(0, FIRST, size=int(special.sum()))
    return ids, segment


def test_the_number_is_the_nearest_to_the_share_and_at_least_one():
    n = np.arange(0, 600)
    expected = [0] + [max(1, round(0.15 * k)) for k in range(1, 600)]
    assert num_to_mask(n, 0.15).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.sampled_from([0.15, 0.4]), st.integers(0, 99))
def test_each_segment_gets_exactly_its_number_and_special_tokens_none(lengths, probability, seed):
    ids, segment = some_text(lengths, seed)
    changed = ids.copy()
    positions, labels = masker(probability)(changed, segment, np.random.default_rng(seed))
    maskable = np.bincount(segment[ids >= FIRST], minlength=len(lengths))
    assert (
        np.bincount(segment[positions], minlength=len(lengths)).tolist() == num_to_mask(maskable, probability).tolist()
    )
    assert (np.diff(positions) > 0).all()
    assert (labels >= FIRST).all()
    assert np.array_equal(ids[positions], labels)
    untouched = np.ones(len(ids), dtype=bool)
    untouched[positions] = False
    assert np.array_equal(ids[untouched], changed[untouched])


def test_eighty_ten_ten():
    """Each share within 5 standard deviations of 60,000 draws: ±0.8 % and ±0.6 %."""
    ids, segment = some_text([500] * 1000, 0)
    changed = ids.copy()
    positions, labels = masker()(changed, segment, np.random.default_rng(0))
    n, new = len(positions), changed[positions]
    replaced = new[(new != SPECIAL.mask) & (new != labels)]
    regular = VOCAB - FIRST
    for count, share in (
        ((new == SPECIAL.mask).sum(), 0.8),
        ((new == labels).sum(), 0.1 + 0.1 / regular),
        (len(replaced), 0.1 - 0.1 / regular),
    ):
        assert abs(count - n * share) < 5 * np.sqrt(n * share * (1 - share))
    assert replaced.min() >= FIRST
    # Replacements are uniform over the regular ids: χ² with 994 degrees of freedom, ±5 deviations.
    observed = np.bincount(replaced, minlength=VOCAB)[FIRST:]
    expected = len(replaced) / regular
    assert abs(((observed - expected) ** 2 / expected).sum() - (regular - 1)) < 5 * np.sqrt(2 * (regular - 1))


def test_every_position_is_as_likely():
    length, segments = 40, 6000
    ids = np.random.default_rng(0).integers(FIRST, VOCAB, size=length * segments)
    positions, _ = masker()(ids, np.repeat(np.arange(segments), length), np.random.default_rng(1))
    observed = np.bincount(positions % length, minlength=length)
    expected = segments * 6 / length  # 0.15 · 40 = 6
    assert observed.sum() == segments * 6
    assert np.abs(observed - expected).max() < 5 * np.sqrt(expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 99))
def test_whole_words_are_masked_whole_within_the_number(lengths, seed):
    ids, segment = some_text(lengths, seed)
    positions, _ = masker(whole_word=True)(ids.copy(), segment, np.random.default_rng(seed))
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[positions] = True
    assert len(np.unique(positions)) == len(positions)
    words: list[list[list[int]]] = [[] for _ in lengths]  # of each segment, the positions of each word
    for i, token in enumerate(ids):
        if token < FIRST:
            continue
        continues = continues_word(VOCAB)[token] and i > 0 and segment[i - 1] == segment[i] and ids[i - 1] >= FIRST
        if continues:
            words[segment[i]][-1].append(i)
        else:
            words[segment[i]].append([i])
    for in_segment in words:
        assert all(len(set(chosen[word].tolist())) == 1 for word in in_segment)
        bound = int(num_to_mask(np.array(sum(map(len, in_segment))), 0.15))
        taken = sum(int(chosen[word].sum()) for word in in_segment)
        assert taken <= bound
        # and none that was left out would have fitted
        assert all(len(word) > bound - taken for word in in_segment if not chosen[word[0]])


def test_masks_follow_the_generator():
    ids, segment = some_text([100] * 10, 0)
    first, again, other = (masker()(ids.copy(), segment, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("whole_word", [False, True])
def test_nothing_to_mask(whole_word):
    ids = np.full(7, SPECIAL.pad)
    positions, labels = masker(whole_word=whole_word)(ids, np.zeros(7, dtype=np.int64), np.random.default_rng(0))
    assert len(positions) == len(labels) == 0
