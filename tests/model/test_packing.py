"""pack_padded and to_padded are inverse, and invalid batches are rejected."""

import dataclasses

import pytest
import torch
from bert_cases import LENGTHS, MICRO, padded_examples, with_slack

from fusebert.model import IGNORE, PackedBatch, pack_padded, to_padded


@pytest.fixture
def examples():
    return padded_examples(MICRO)


def test_packing_keeps_every_token_in_order(examples):
    batch = pack_padded(**examples)
    assert batch.cu_seqlens.tolist() == [0, 17, 18, 58, 63, 86]
    assert batch.cu_seqlens.dtype == torch.int32
    for row, length in enumerate(LENGTHS):
        segment = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        assert torch.equal(batch.input_ids[segment], examples["input_ids"][row, :length])
        assert torch.equal(batch.token_type_ids[segment], examples["token_type_ids"][row, :length])
        assert batch.position_ids[segment].tolist() == list(range(length))
    assert batch.max_seqlen == 40
    assert batch.num_tokens == 86
    assert batch.num_pairs == 4
    labels = examples["labels"]
    assert batch.num_masked == (labels != IGNORE).sum()
    assert torch.equal(batch.masked_labels, labels[labels != IGNORE])
    real_labels = labels[examples["attention_mask"].bool()]
    assert torch.equal(real_labels[batch.masked_positions], batch.masked_labels)


def test_to_padded_returns_the_examples_without_slack(examples):
    batch = pack_padded(**examples)
    for packed in (batch, with_slack(batch, tokens=7, segments=3, masked=4), with_slack(batch, 0, 2, 1)):
        padded = to_padded(packed)
        assert padded.keys() == examples.keys()
        for name, tensor in examples.items():
            assert torch.equal(padded[name], tensor), name


def test_padding_skips_empty_segments_between_real_ones():
    batch = PackedBatch(
        input_ids=torch.tensor([4, 5, 6, 9]),
        token_type_ids=torch.tensor([0, 1, 0, 0]),
        position_ids=torch.tensor([0, 1, 0, 0]),
        cu_seqlens=torch.tensor([0, 0, 2, 2, 3, 4, 4], dtype=torch.int32),
        masked_positions=torch.tensor([2, 0]),
        masked_labels=torch.tensor([7, IGNORE]),
        nsp_labels=torch.tensor([IGNORE, 1, IGNORE, 0, IGNORE, IGNORE]),
        max_seqlen=2,
        num_tokens=3,
        num_masked=1,
        num_pairs=2,
    )
    padded = to_padded(batch, pad_token_id=3)
    assert padded["input_ids"].tolist() == [[4, 5], [6, 3]]
    assert padded["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert padded["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert padded["labels"].tolist() == [[IGNORE, IGNORE], [7, IGNORE]]
    assert padded["next_sentence_label"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="no tokens besides slack"):
        to_padded(dataclasses.replace(batch, num_tokens=0))


def test_only_input_ids_are_needed(examples):
    batch = pack_padded(examples["input_ids"])
    assert batch.num_tokens == 5 * 40
    assert (batch.num_masked, batch.num_pairs) == (0, 0)
    assert batch.token_type_ids.unique().tolist() == [0]
    assert batch.nsp_labels.tolist() == [IGNORE] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, "input_ids must be"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "input_ids must be"),
        ({"attention_mask": torch.ones(5, 39)}, "attention_mask must have shape"),
        ({"next_sentence_label": torch.zeros(4, dtype=torch.int64)}, "next_sentence_label must have shape"),
        ({"attention_mask": torch.arange(40).expand(5, 40) > 3}, "attention_mask must be one or more ones"),
        ({"attention_mask": torch.zeros(5, 40), "labels": None}, "attention_mask must be one or more ones"),
        ({"labels": torch.zeros(5, 40, dtype=torch.int64)}, "labels must be -100 wherever"),
    ],
)
def test_bad_padded_input_is_named(examples, change, message):
    with pytest.raises(ValueError, match=message):
        pack_padded(**{**examples, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": torch.zeros(6, dtype=torch.int64)}, TypeError, "cu_seqlens must be torch.int32"),
        ({"input_ids": torch.zeros(86)}, TypeError, "input_ids must be torch.int64"),
        ({"position_ids": torch.zeros(1, dtype=torch.int64)}, ValueError, "position_ids must have one axis"),
        ({"masked_labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "masked_labels must have one axis"),
        ({"nsp_labels": torch.zeros(6, dtype=torch.int64)}, ValueError, "cu_seqlens must have one entry more"),
    ],
)
def test_bad_packed_batch_is_named(examples, change, error, message):
    batch = pack_padded(**examples)
    with pytest.raises(error, match=message):
        dataclasses.replace(batch, **change)


def test_moving_a_batch_keeps_its_counts(examples):
    batch = pack_padded(**examples)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.cu_seqlens.device.type == "meta"
    assert (moved.num_tokens, moved.max_seqlen) == (batch.num_tokens, batch.max_seqlen)
