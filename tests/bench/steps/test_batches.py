"""Random batches have BERT's statistics and the packed batch's form."""

import numpy as np
import pytest
import torch

from fusebert.bench.steps.batches import CLS, FIRST_ORDINARY, MASK, SEP, draw_lengths, random_batches
from fusebert.model import IGNORE, to_padded
from fusebert.model.batch import PackedBatch


@pytest.mark.parametrize("ragged", [False, True])
def test_form(ragged):
    batches = random_batches(500, 2051, 64, 3, ragged=ragged)
    shapes = {(len(b.input_ids), len(b.nsp_labels), len(b.masked_positions), b.max_seqlen) for b in batches}
    assert len(shapes) == 1  # constant over a run
    for batch in batches:
        assert isinstance(batch, PackedBatch)
        bounds = batch.cu_seqlens
        assert bounds[0] == 0
        assert bounds[-1] == len(batch.input_ids) == 2051
        assert bounds[batch.num_pairs] == batch.num_tokens
        assert 0 <= len(batch.input_ids) - batch.num_tokens < (64 if not ragged else 8)
        assert int(bounds.diff().max()) <= batch.max_seqlen == 64
        assert int((batch.masked_labels != IGNORE).sum()) == batch.num_masked
        assert int((batch.nsp_labels != IGNORE).sum()) == batch.num_pairs
        assert int(batch.input_ids.min()) >= 0
        assert int(batch.input_ids.max()) < 500
        for s in range(batch.num_pairs):
            start, end = int(bounds[s]), int(bounds[s + 1])
            assert batch.input_ids[start] == CLS
            assert batch.input_ids[end - 1] == SEP
            assert torch.equal(batch.position_ids[start:end], torch.arange(end - start))
            assert batch.token_type_ids[start] == 0
            assert batch.token_type_ids[end - 1] == 1
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_masking_rates():
    (batch,) = random_batches(5000, 60000, 128, 1)
    labelled = batch.masked_labels[: batch.num_masked]
    positions = batch.masked_positions[: batch.num_masked]
    assert len(set(positions.tolist())) == batch.num_masked
    assert batch.num_masked / batch.num_tokens == pytest.approx(0.15 * 125 / 128, rel=0.02)
    assert int(labelled.min()) >= FIRST_ORDINARY  # neither [CLS] nor [SEP]
    shown = batch.input_ids[positions]
    masked = (shown == MASK).double().mean().item()
    kept = (shown == labelled).double().mean().item()
    assert masked == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1, abs=0.015)  # but for the random tokens that happen to be the original
    elsewhere = torch.ones_like(batch.input_ids, dtype=torch.bool)
    elsewhere[positions] = False
    assert not bool((batch.input_ids[elsewhere] == MASK).any())


def test_ragged_lengths_are_about_half_and_reach_the_longest():
    lengths = draw_lengths(np.random.default_rng(0), 65536, 512, ragged=True)
    assert max(lengths) == 512
    assert min(lengths) >= 8
    assert 0.4 < np.mean(lengths) / 512 < 0.6
    assert 65536 - sum(lengths) < 8


def test_transformers_gets_the_same_examples():
    (batch,) = random_batches(500, 512, 64, 1, ragged=True)
    padded = to_padded(batch)
    assert padded["input_ids"].shape == (batch.num_pairs, 64)
    assert int(padded["attention_mask"].sum()) == batch.num_tokens
    assert int((padded["labels"] != IGNORE).sum()) == batch.num_masked


@pytest.mark.parametrize(("tokens", "seqlen"), [(64, 65), (64, 7)])
def test_lengths_that_cannot_be_drawn(tokens, seqlen):
    with pytest.raises(ValueError, match="seqlen must be in"):
        draw_lengths(np.random.default_rng(0), tokens, seqlen, ragged=True)


def test_a_vocabulary_too_small():
    with pytest.raises(ValueError, match="vocab_size"):
        random_batches(8, 64, 32, 1)
