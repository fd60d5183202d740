"""`fusebert convert`: TensorFlow checkpoints of google-research/bert."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tf_checkpoints import variables_of, write_checkpoint

from fusebert.model.hf import from_hf
from fusebert.train.errors import UserError
from fusebert.train.tasks.convert import ConvertSettings, convert

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "river", "##s", "."]
SIZES = {
    "vocab_size": len(VOCAB),
    "hidden_size": 32,
    "num_hidden_layers": 11,  # layer_1 and layer_10
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}

Place = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Writes a model's checkpoint, and changes to it, with its configuration and vocabulary."""

    def write(model: torch.nn.Module, **changes: np.ndarray | None) -> Path:
        folder = tmp_path / "original"
        variables = {**variables_of(model), **changes}
        kept = {name: value for name, value in variables.items() if value is not None}
        write_checkpoint(folder / "bert_model.ckpt", kept, monkeypatch)
        content = {**SIZES, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        (folder / "bert_config.json").write_text(
            json.dumps({**content, "initializer_range": 0.02, "pooler_fc_size": 9})
        )
        (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
        return folder / "bert_model.ckpt"

    return write


def new_model(kind: type, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**SIZES, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases too
    return model.eval()


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    ids = torch.tensor([[2, 5, 6, 7, 8, 9, 3], [2, 6, 5, 3, 9, 8, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        found = model.eval()(input_ids=ids, token_type_ids=types)
    return [each for each in found.values() if each.is_floating_point()]


@pytest.mark.parametrize("name", ["PreTraining", "MaskedLM", "SequenceClassification", "QuestionAnswering", "Model"])
def test_transformers_loads_the_same_model(place: Place, tmp_path: Path, name: str) -> None:
    kind = transformers.BertModel if name == "Model" else getattr(transformers, f"BertFor{name}")
    model = new_model(kind, **({"num_labels": 3} if name == "SequenceClassification" else {}))
    checkpoint = place(torch.nn.ModuleDict({"bert": model}) if name == "Model" else model)
    (note, *absent) = convert(ConvertSettings(tf=checkpoint, out=tmp_path / "hf"))
    assert f"Bert{name if name == 'Model' else 'For' + name}" in note
    assert "lower-cased" in note
    assert len(absent) == {"PreTraining": 0, "MaskedLM": 2}.get(name, 3 if name == "QuestionAnswering" else 2)
    loaded, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for ours, theirs in zip(outputs(loaded), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("The rivers.")["input_ids"] == [2, 5, 7, 8, 9, 3]
    assert tokenizer.model_max_length == 40


def test_our_encoder_reads_it(place: Place, tmp_path: Path) -> None:
    convert(ConvertSettings(tf=place(new_model(transformers.BertForPreTraining)).parent, out=tmp_path / "hf"))
    assert from_hf(tmp_path / "hf").config.num_hidden_layers == 11


def test_case_is_by_the_vocabulary_or_as_told(place: Place, tmp_path: Path) -> None:
    checkpoint = place(new_model(transformers.BertForPreTraining))
    (note,) = convert(ConvertSettings(tf=checkpoint, out=tmp_path / "hf", lowercase=False))
    assert "text is read cased" in note
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("The fox")["input_ids"] == [2, 1, 6, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"electra/embeddings/word_embeddings": np.zeros(3, np.float32)}, r"not of a BERT.*electra/embeddings"),
        ({"bert/encoder/layer_0/strange/kernel": np.zeros((3, 2), np.float32)}, r"layer.0.strange.weight is unknown"),
        ({"bert/pooler/dense/what": np.zeros(3, np.float32)}, r"not of a BERT.*pooler/dense/what"),
        ({"model/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(3, np.float32)}, "TensorFlow 2's objects"),
        ({"bert/encoder/layer_10/output/dense/bias": None}, r"layer.10.output.dense.bias is missing"),
        ({"bert/encoder/layer_3/output/dense/bias": np.zeros(31, np.float32)}, r"has shape \(31,\), but"),
        ({"output_weights": np.zeros((2, 32), np.float32)}, "heads of several tasks"),
        ({"cls/predictions/output_bias": None, "cls/predictions/transform/dense/kernel": None}, "is missing"),
    ],
)
def test_what_is_no_bert(place: Place, tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    checkpoint = place(new_model(transformers.BertForPreTraining), **changes)
    with pytest.raises((UserError, ValueError), match=message):
        convert(ConvertSettings(tf=checkpoint, out=tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_files_that_are_missing_or_damaged(place: Place, tmp_path: Path) -> None:
    checkpoint = place(new_model(transformers.BertForPreTraining))
    for tf, message in (
        (tmp_path, r"holds no checkpoint \(NAME.index\)"),
        (tmp_path / "other.ckpt", "there is no other.ckpt.index"),
    ):
        with pytest.raises(UserError, match=message):
            convert(ConvertSettings(tf=tf, out=tmp_path / "hf"))
    with pytest.raises(UserError, match=r"no.json does not exist: give the file with --config"):
        convert(ConvertSettings(tf=checkpoint, out=tmp_path / "hf", config=tmp_path / "no.json"))
    index = Path(f"{checkpoint}.index")
    (checkpoint.parent / "two.index").write_bytes(index.read_bytes())
    with pytest.raises(UserError, match=r"several checkpoints: give one of .*bert_model.ckpt"):
        convert(ConvertSettings(tf=checkpoint.parent, out=tmp_path / "hf"))
    index.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or a file of it is missing"):
        convert(ConvertSettings(tf=checkpoint, out=tmp_path / "hf"))


def test_without_tensorflow(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = place(new_model(transformers.BertForPreTraining))
    for name in ("tensorflow", "tensorflow.errors", "tensorflow.train"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'fusebert[tensorflow]'")):
        convert(ConvertSettings(tf=checkpoint, out=tmp_path / "hf"))
