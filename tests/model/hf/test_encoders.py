"""Folders of every family, opened: the hidden states, logits and heads are Transformers'."""

import json

import pytest
import torch
from hf_families import DISTIL, NO_DROPOUT, TEXT, randomised
from safetensors.torch import load_file, save_file
from texts import text_batch

from fusebert.model import BertConfig, BertForPreTraining
from fusebert.model.heads import SentenceEncoder, SequenceClassifier
from fusebert.model.hf.encoders import Loading, load_weights, open_encoder
from fusebert.model.hf.save_classifier import save_classifier

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "Bert": {**TEXT, **NO_DROPOUT},
    "Roberta": {**TEXT, **NO_DROPOUT, "type_vocab_size": 1, "pad_token_id": 1},
    "XLMRoberta": {**TEXT, **NO_DROPOUT, "type_vocab_size": 1, "pad_token_id": 1},
    "Camembert": {**TEXT, **NO_DROPOUT, "type_vocab_size": 1, "pad_token_id": 1},
    "Electra": {**TEXT, **NO_DROPOUT, "embedding_size": 16},
    "DistilBert": {**DISTIL, "dropout": 0.0, "attention_dropout": 0.0},
}


def model(name, **settings):
    family = max((family for family in SIZES if name.startswith(family)), key=len)
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return randomised(cls(cls.config_class(**{**SIZES[family], **settings}))).eval()


@pytest.fixture(scope="module")
def padded():
    torch.manual_seed(1)
    mask = (torch.arange(17) < torch.tensor([17, 3, 11, 1])[:, None]).long()
    ids = torch.randint(5, 61, mask.shape)
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}  # RoBERTa finds positions by the pad token 1


def inputs(name, padded):
    return {k: v for k, v in padded.items() if not (name.startswith("DistilBert") and k == "token_type_ids")}


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("family", SIZES)
def test_an_encoder_gives_the_hidden_states_of_transformers(family, pooling, padded, tmp_path):
    theirs = model(f"{family}Model")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        hidden = theirs(**inputs(family, padded)).last_hidden_state
    real = padded["attention_mask"][..., None].bool()
    expected = {
        "cls": hidden[:, 0],
        "mean": (hidden * real).sum(1) / real.sum(1),
        "max": hidden.masked_fill(~real, -torch.inf).amax(1),
    }[pooling]
    folder = open_encoder(tmp_path)
    ours = SentenceEncoder(folder.config, pooling, folder.embedding_size).eval()
    loading = load_weights(ours, folder)
    assert not loading.missing
    assert all("pooler" in name for name in loading.left_over), loading
    with torch.no_grad():
        given = ours(text_batch(padded, empty=2))
    torch.testing.assert_close(given[:4], expected, rtol=1e-4, atol=1e-5)
    if pooling == "cls":
        assert given.isfinite().all()


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_pooler(family, padded, tmp_path):
    theirs = model(f"{family}Model")
    theirs.save_pretrained(tmp_path)
    folder = open_encoder(tmp_path)
    ours = SentenceEncoder(folder.config, "pooler").eval()
    assert load_weights(ours, folder) == Loading((), ())
    with torch.no_grad():
        torch.testing.assert_close(ours(text_batch(padded)), theirs(**padded).pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SIZES)
def test_the_masked_language_head(family, padded, tmp_path):
    theirs = model(f"{family}ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    folder = open_encoder(tmp_path)
    ours = BertForPreTraining(folder.config, folder.embedding_size).eval()
    loading = load_weights(ours, folder)
    assert not loading.left_over
    assert all("pooler" in name or "nsp" in name or "seq_relationship" in name for name in loading.missing)
    batch = text_batch(padded)
    with torch.no_grad():
        hidden = ours.encoder(batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens, 17)
        expected = theirs(**inputs(family, padded)).logits[padded["attention_mask"].bool()]
        torch.testing.assert_close(ours.predict_tokens(hidden), expected, rtol=1e-4, atol=1e-4)


def test_missing_and_left_over_weights_are_listed(tmp_path):
    model("BertForMaskedLM").save_pretrained(tmp_path)
    folder = open_encoder(tmp_path)
    loading = load_weights(SentenceEncoder(folder.config, "pooler"), folder)
    assert loading.missing == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert "cls.predictions.bias" in loading.left_over
    assert "initialised at random: bert.pooler.dense.weight" in str(loading)


def test_our_own_folders_open(tmp_path):
    from bert_cases import bert

    from fusebert.model import save_hf

    save_hf(bert(), tmp_path / "hf")
    folder = open_encoder(tmp_path / "hf")
    again = BertForPreTraining(folder.config)
    assert load_weights(again, folder) == Loading((), ())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), bert().parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mpnet"}, "model_type 'mpnet' is not one of bert, roberta"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu'"),
        ({"num_hidden_layers": 3}, "bert.encoder.layer.2.attention.self.query.weight is missing"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"vocab_size": 10**12}, "but the configuration needs (1000000000000, 32)"),
        ({"max_position_embeddings": 39}, "has shape (40, 32), but the configuration needs (39, 32)"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(changes, expected, tmp_path):
    model("BertModel").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ValueError, match=r".*") as raised:
        open_encoder(tmp_path)
    assert expected in str(raised.value)


def test_a_decoder_that_is_not_tied_is_refused(tmp_path):
    model("RobertaForMaskedLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    folder = open_encoder(tmp_path)
    load_weights(SentenceEncoder(folder.config), folder)  # does not use it
    with pytest.raises(ValueError, match=r"lm_head.decoder.weight differs from roberta\.embeddings"):
        load_weights(BertForPreTraining(folder.config), folder)


PROBLEMS = {
    "single_label_classification": torch.tensor([2, 0, 1, 1]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
    "regression": torch.tensor([0.5, -100.0, 3.0, 1.0]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_the_classification_head(family, problem, padded, tmp_path):
    """Logits, the mean loss, and the folder written from it; empty segments count nothing, and have no NaN gradient."""
    labels = PROBLEMS[problem]
    outputs = 1 if problem == "regression" else 3
    theirs = model(f"{family}ForSequenceClassification", num_labels=outputs, problem_type=problem)
    theirs.save_pretrained(tmp_path)
    folder = open_encoder(tmp_path)
    ours = SequenceClassifier(
        folder.config,
        outputs,
        problem,
        activation=folder.family.activation,
        embedding_size=folder.embedding_size,
    ).eval()
    assert load_weights(ours, folder) == Loading((), ())
    expected = theirs(**inputs(family, padded), labels=labels)
    batch = text_batch(padded, labels, empty=2)
    torch.testing.assert_close(ours.logits(batch)[:4], expected.logits, rtol=1e-4, atol=1e-5)
    result = ours(batch)
    torch.testing.assert_close(result.loss_sum / 4, expected.loss, rtol=1e-4, atol=1e-5)
    result.loss_sum.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)
    save_classifier(ours, tmp_path / "saved", folder, [f"name {i}" for i in range(outputs)], {"vocab.txt": b"[PAD]"})
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (type(again), again.config.problem_type) == (type(theirs), problem)
    assert again.config.id2label == {i: f"name {i}" for i in range(outputs)}
    torch.testing.assert_close(again.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == b"[PAD]"
    if problem == "single_label_classification":
        assert int(result.correct) == int((expected.logits.argmax(-1) == labels).sum())


def test_class_weights_scale_the_loss_of_a_class(padded):
    config = BertConfig.preset("tiny", 61)
    torch.manual_seed(0)
    plain = SequenceClassifier(config, 2).eval()
    weighted = SequenceClassifier(config, 2, class_weights=[1.0, 3.0]).eval()
    weighted.load_state_dict(plain.state_dict())
    only = text_batch(padded, torch.tensor([1, 1, 1, 1]))
    torch.testing.assert_close(weighted(only).loss_sum, 3 * plain(only).loss_sum)
