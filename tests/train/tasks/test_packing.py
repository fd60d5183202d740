"""Texts in batches: within the budget, each once, and the slack in segments that have no label."""

import numpy as np
import pytest
import torch

from fusebert.train.tasks.packing import pack_texts, token_budget
from fusebert.train.tasks.tokens import EncodedText


def text(length: int) -> EncodedText:
    return EncodedText(np.arange(1, length + 1), np.zeros(length, dtype=np.int64))


def test_groups_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=200)
    lengths[7] = 300
    groups = token_budget(lengths.tolist(), 128)
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    assert all(lengths[group].sum() <= 128 or len(group) == 1 for group in groups)
    assert (np.diff(lengths[np.concatenate(groups)]) <= 0).all()
    assert token_budget([], 128) == []


def test_without_slack() -> None:
    batch = pack_texts([text(3), text(2)], torch.tensor([1, 0]))
    assert batch.input_ids.tolist() == [1, 2, 3, 1, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_labels) == (3, 5, 2)


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), torch.tensor([0.5, 1.0]), torch.ones(2, 3)])
def test_slack_and_empty_segments_have_no_label(labels: torch.Tensor) -> None:
    batch = pack_texts([text(3), text(2)], labels, max_seqlen=4, tokens=16, segments=8)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 13, 16, 16, 16, 16]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert torch.equal(batch.labels[:2], labels)
    assert batch.labels.shape == (8, *labels.shape[1:])
    spare = batch.labels[2:]
    assert bool((spare == -100).all() if spare.dtype == torch.int64 else spare.isnan().all())


def test_texts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit into 4 tokens"):
        pack_texts([text(3), text(2)], tokens=4)
    with pytest.raises(ValueError, match="and 2 segments"):
        pack_texts([text(3), text(2)], tokens=8, segments=2)
