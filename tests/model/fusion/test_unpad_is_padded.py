"""unpad=True gives the padded model's result wherever a result is read."""

import copy

import pytest
import torch
from hf_families import DISTIL, MODERN, NO_DROPOUT, TEXT, LinearInputs, batch, build, randomised
from oracle import DEVICE

from fusebert.model import fuse

transformers = pytest.importorskip("transformers", minversion="5")

BERT = {**TEXT, **NO_DROPOUT, "pad_token_id": 0}
NO_DISTIL_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"), 0.0)
FIELDS = {
    "Bert": BERT,
    "Roberta": BERT,
    "XLMRoberta": BERT,
    "Camembert": BERT,
    "Electra": {**BERT, "embedding_size": 16},
    "DistilBert": {**DISTIL, **NO_DISTIL_DROPOUT},
    "ModernBert": {**TEXT, **MODERN},
}
FAMILY = pytest.mark.parametrize("family", FIELDS)


def _build(family, head, **fields):
    cls = getattr(transformers, family + head)
    torch.manual_seed(0)
    return randomised(cls(cls.config_class(**FIELDS[family], **fields))).train()


def _pair(model):
    plain = copy.deepcopy(model)
    return model, plain, fuse(model, unpad=True)


def _same(model, plain, inputs, logits):
    ours, theirs = (m(**inputs) for m in (model, plain))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[logits], theirs[logits], rtol=1e-4, atol=1e-5)


@FAMILY
def test_question_answering(family):
    """The softmax over positions includes padding."""
    model, plain, report = _pair(_build(family, "ForQuestionAnswering"))
    assert "the softmax of its head includes the rows of padding" in str(report)
    places = torch.tensor([3, 1, 5], device=DEVICE)
    inputs = {**batch("bert"), "start_positions": places, "end_positions": places + 1}
    _same(model, plain, inputs, "start_logits")


@FAMILY
def test_padding_on_the_left(family):
    """Classifiers and poolers read the first row."""
    model, plain, _ = _pair(_build(family, "ForSequenceClassification"))
    inputs = {name: x.flip(1) for name, x in batch("bert").items()}
    inputs["labels"] = torch.tensor([0, 1, 0], device=DEVICE)
    _same(model, plain, inputs, "logits")


@FAMILY
def test_padding_on_the_right_is_removed(family):
    model, plain, _ = _pair(_build(family, "ForSequenceClassification"))
    inputs = {**batch("bert"), "labels": torch.tensor([0, 1, 0], device=DEVICE)}
    with LinearInputs() as linears:
        ours = model(**inputs)
    assert (1, 17 + 3 + 11) in linears.sizes
    torch.testing.assert_close(ours.loss, plain(**inputs).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernberts_window_counts_a_hole(pooling):
    model, plain, _ = _pair(_build("ModernBert", "ForSequenceClassification", classifier_pooling=pooling))
    inputs = batch("bert")
    inputs["attention_mask"][0, 3:9] = 0
    inputs["attention_mask"][2, 2] = 0
    ours, theirs = (m(**inputs).logits for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("summary", ["first", "last", "mean"])
def test_a_summary_of_all_rows(summary):
    model, plain, report = _pair(_build("Electra", "ForMultipleChoice", summary_type=summary))
    assert ("reads the rows of padding" in str(report)) == (summary != "first")
    inputs = {name: x[:, None].repeat(1, 2, 1) for name, x in batch("bert").items()}
    ours, theirs = (m.eval()(**inputs).logits for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlm_loss", [False, True])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification"])
@FAMILY
def test_labels_on_padding(family, head, mlm_loss):
    """For example labels=input_ids.clone(), with the padding token as a label."""
    model = _build(family, head)
    plain, inputs = copy.deepcopy(model), batch("bert")
    fuse(model, unpad=True, mlm_loss=mlm_loss)
    everywhere = inputs["input_ids"] % 2
    for labels in (everywhere, everywhere.masked_fill(inputs["attention_mask"] == 0, -100), everywhere):
        with LinearInputs() as linears:
            ours = model(inputs["input_ids"], inputs["attention_mask"], labels=labels)
        torch.testing.assert_close(ours.loss, plain(**inputs, labels=labels).loss, rtol=1e-5, atol=1e-6)
        assert ((1, 31) in linears.sizes) == (labels is not everywhere)


def test_an_empty_sequence_stays_padded():
    model, inputs = build("bert").eval(), batch("bert")
    inputs["attention_mask"][1] = 0
    fuse(model, unpad=True)
    with torch.no_grad(), LinearInputs() as linears:
        assert model(**inputs).last_hidden_state.isfinite().all()
    assert (3, 17) in linears.sizes
