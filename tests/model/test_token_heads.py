"""The heads that read every token: logits, losses and folders are Transformers', for each family."""

import dataclasses

import pytest
import torch
from hf_families import DISTIL, NO_DROPOUT, TEXT, randomised
from texts import text_batch

from fusebert.model.heads import SpanPredictor, TokenClassifier, span_loss
from fusebert.model.hf.encoders import Loading, load_weights, open_encoder
from fusebert.model.hf.save_classifier import save_span_predictor, save_tagger

transformers = pytest.importorskip("transformers", minversion="5")

ROBERTA = {**TEXT, **NO_DROPOUT, "type_vocab_size": 1, "pad_token_id": 1}
SIZES = {
    "Bert": {**TEXT, **NO_DROPOUT},
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "Camembert": ROBERTA,
    "Electra": {**TEXT, **NO_DROPOUT, "embedding_size": 16},
    "DistilBert": {**DISTIL, "dropout": 0.0, "attention_dropout": 0.0},
}
LENGTHS = (17, 3, 11, 1)


@pytest.fixture(scope="module")
def padded():
    torch.manual_seed(1)
    mask = (torch.arange(17) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 61, mask.shape)
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def make(family, task, **settings):
    cls = getattr(transformers, f"{family}For{task}")
    torch.manual_seed(0)
    return randomised(cls(cls.config_class(**{**SIZES[family], **settings}))).eval()


def gradients(model, folder, loss):
    """By Transformers' names; a parameter that stacks several of theirs is split."""
    loss.backward()
    names = folder.family.names(folder.config.num_hidden_layers)
    found = {}
    for ours, parameter in model.named_parameters():
        if parameter.grad is not None and ours in names and "position" not in ours:
            theirs = names[ours]
            found |= dict(zip(theirs, parameter.grad.chunk(len(theirs)), strict=True))
    return found


def assert_saved(folder, theirs):
    again, info = getattr(transformers, f"AutoModelFor{type(theirs).__name__.partition('For')[2]}").from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(theirs)
    torch.testing.assert_close(again.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    return again


@pytest.mark.parametrize("family", SIZES)
def test_a_class_for_each_token(family, padded, tmp_path):
    theirs = make(family, "TokenClassification", num_labels=5)
    theirs.save_pretrained(tmp_path)
    folder = open_encoder(tmp_path)
    ours = TokenClassifier(folder.config, 5, embedding_size=folder.embedding_size).eval()
    assert load_weights(ours, folder) == Loading((), ())
    real = padded["attention_mask"].bool()
    labels = torch.where(torch.rand(real.shape) < 0.5, torch.randint(0, 5, real.shape), -100)
    labels[~real] = -100
    expected = theirs(**padded, labels=labels)
    batch = dataclasses.replace(text_batch(padded, empty=2), labels=labels[real])
    torch.testing.assert_close(ours.logits(batch), expected.logits[real], rtol=1e-5, atol=1e-5)
    result = ours(batch)
    count = (labels != -100).sum()
    torch.testing.assert_close(result.loss_sum / count, expected.loss, rtol=1e-5, atol=1e-6)
    assert result.correct == (expected.logits.argmax(-1) == labels).sum()
    expected.loss.backward()
    mine = gradients(ours, folder, result.loss_sum / count)
    for name, parameter in theirs.named_parameters():
        if name in mine:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert "classifier.weight" in mine
    names = ["O", "B-A", "I-A", "B-B", "I-B"]
    save_tagger(ours, tmp_path / "saved", folder, names, {})
    assert assert_saved(tmp_path / "saved", theirs).config.id2label == dict(enumerate(names))


@pytest.mark.parametrize("family", SIZES)
def test_an_answer_in_a_text(family, padded, tmp_path):
    theirs = make(family, "QuestionAnswering")
    theirs.save_pretrained(tmp_path)
    folder = open_encoder(tmp_path)
    ours = SpanPredictor(folder.config, embedding_size=folder.embedding_size).eval()
    assert load_weights(ours, folder) == Loading((), ())
    answers = torch.tensor([[3, 16], [0, 0], [5, 5], [0, 0]])
    batch = text_batch(padded, answers, empty=2)
    real = padded["attention_mask"].bool()
    out = theirs(**padded)
    expected = torch.stack([out.start_logits, out.end_logits], -1)
    torch.testing.assert_close(ours.logits(batch), expected[real], rtol=1e-5, atol=1e-5)
    # Transformers' loss is over the padding too: each text alone has none.
    losses = [
        theirs(
            **{name: x[i : i + 1, :length] for name, x in padded.items()},
            start_positions=answers[i : i + 1, 0],
            end_positions=answers[i : i + 1, 1],
        ).loss
        for i, length in enumerate(LENGTHS)
    ]
    result = ours(batch)
    torch.testing.assert_close(result.loss_sum / 4, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    torch.stack(losses).mean().backward()
    mine = gradients(ours, folder, result.loss_sum / 4)
    for name, parameter in theirs.named_parameters():
        if name in mine:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert "qa_outputs.weight" in mine
    ours.null_threshold = 1.5
    save_span_predictor(ours, tmp_path / "saved", folder, {})
    assert assert_saved(tmp_path / "saved", theirs).config.null_threshold == 1.5


def test_texts_without_an_answer_do_not_count(padded):
    answers = torch.tensor([[3, 16], [-100, -100], [5, 5], [-100, -100]])
    batch = text_batch(padded, answers, empty=3)
    logits = (100 * torch.randn(sum(LENGTHS), 2)).requires_grad_()
    result = span_loss(logits, batch)
    result.loss_sum.backward()
    starts, total = batch.cu_seqlens.tolist(), 0.0
    for i in (0, 2):
        for side in (0, 1):
            own = logits[starts[i] : starts[i + 1], side]
            total += torch.nn.functional.cross_entropy(own, answers[i, side]) / 2
    torch.testing.assert_close(result.loss_sum, total)
    assert logits.grad.isfinite().all()
    assert not logits.grad[17:20].any()
    peaked = torch.zeros(sum(LENGTHS), 2)
    peaked[[3, 16, 25, 26], [0, 1, 0, 1]] = 9.0  # both of the first text, the start alone of the third
    assert span_loss(peaked, batch).correct == 1


@pytest.mark.parametrize(
    ("family", "settings", "tag", "span"),
    [
        ("Bert", {"hidden_dropout_prob": 0.2}, 0.2, 0.0),
        ("Bert", {"hidden_dropout_prob": 0.2, "classifier_dropout": 0.3}, 0.3, 0.0),
        ("DistilBert", {"dropout": 0.2, "seq_classif_dropout": 0.4}, 0.2, 0.1),
        ("DistilBert", {"qa_dropout": 0.3}, 0.0, 0.3),
    ],
)
def test_the_dropout_of_the_heads(family, settings, tag, span, tmp_path):
    for task, expected in (("TokenClassification", tag), ("QuestionAnswering", span)):
        theirs = make(family, task, **settings)
        theirs.save_pretrained(tmp_path)
        folder = open_encoder(tmp_path)
        stated = theirs.dropout.p if hasattr(theirs, "dropout") else 0.0
        found = (folder.family.tag_dropout_p if task.startswith("Token") else folder.family.span_dropout_p)(
            folder.settings
        )
        assert found == expected == stated
