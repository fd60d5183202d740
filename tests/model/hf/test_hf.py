"""Hugging Face folders: written for Transformers, read from it, and rejected."""

import dataclasses
import json
import os
import pathlib
import resource

import pytest
import torch
from bert_cases import MICRO, bert
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fusebert.model import BertConfig, BertForPreTraining, from_hf, save_hf
from fusebert.model.hf.load import HF_DEFAULTS


@pytest.fixture
def model():
    return bert()


@pytest.fixture
def folder(model, tmp_path):
    save_hf(model, tmp_path / "bert")
    return tmp_path / "bert"


def change_config(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_same_parameters(left, right):
    left, right = dict(left.named_parameters()), dict(right.named_parameters())
    assert left.keys() == right.keys()
    for name, parameter in left.items():
        assert torch.equal(parameter, right[name]), name


def test_transformers_loads_what_we_wrote(folder):
    transformers = pytest.importorskip("transformers")
    _, info = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_auto_classes_find_the_model(folder):
    transformers = pytest.importorskip("transformers")
    assert type(transformers.AutoModelForPreTraining.from_pretrained(folder)).__name__ == "BertForPreTraining"
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(folder)).__name__ == "BertForMaskedLM"


def test_a_round_trip_keeps_every_bit(model, folder):
    assert_same_parameters(from_hf(folder), model)
    assert from_hf(str(folder)).config == MICRO


def test_a_round_trip_through_transformers_keeps_every_bit(model, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForPreTraining.from_pretrained(folder)
    assert_same_parameters(from_hf(theirs), model)
    theirs.save_pretrained(tmp_path / "whole")
    assert_same_parameters(from_hf(tmp_path / "whole"), model)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_same_parameters(from_hf(tmp_path / "shards"), model)


def test_reading_a_folder_needs_no_transformers(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    from_hf(folder)


def test_old_names_buffers_and_tied_copies_are_accepted(model, folder):
    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")

    change_tensors(folder, age)
    assert_same_parameters(from_hf(folder), model)


def test_half_precision_becomes_float32(model, folder):
    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    change_tensors(folder, halve)
    for name, parameter in from_hf(folder).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, dict(model.named_parameters())[name].bfloat16().float()), name


def test_saving_a_half_precision_model_writes_float32(model, tmp_path):
    save_hf(model.bfloat16(), tmp_path / "bert")
    assert {tensor.dtype for tensor in load_file(tmp_path / "bert" / "model.safetensors").values()} == {torch.float32}
    assert_same_parameters(from_hf(tmp_path / "bert"), model.float())


def test_missing_heads_are_initialised_and_named(model, folder):
    transformers = pytest.importorskip("transformers")
    masked_lm = transformers.BertForMaskedLM.from_pretrained(folder)
    with pytest.warns(
        UserWarning, match="BertForMaskedLM has no pooler and no next-sentence head: initialised at random"
    ):
        ours = from_hf(masked_lm)
    changed = {name for name, p in ours.named_parameters() if not torch.equal(p, dict(model.named_parameters())[name])}
    assert changed == {"pooler.weight", "pooler.bias", "nsp_classifier.weight", "nsp_classifier.bias"}

    with pytest.warns(UserWarning, match="BertModel has no masked-language-model head and no next-sentence head"):
        ours = from_hf(transformers.BertModel.from_pretrained(folder))
    assert torch.equal(ours.pooler.weight, model.pooler.weight)
    assert torch.equal(ours.encoder.layers[1].qkv.weight, model.encoder.layers[1].qkv.weight)
    assert ours.mlm_dense.weight.std() < 0.03  # normal(0, initializer_range)


def test_settings_left_out_have_transformers_defaults(folder):
    transformers = pytest.importorskip("transformers")
    defaults, theirs = dataclasses.asdict(BertConfig(**HF_DEFAULTS)), transformers.BertConfig()
    assert defaults == {name: getattr(theirs, name) for name in defaults}

    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in settings.items() if k not in ("layer_norm_eps", "pad_token_id", "dtype")})
    )
    assert from_hf(folder).config == MICRO


def test_saving_again_replaces_the_model_and_keeps_other_files(model, folder):
    (folder / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.mlm_bias.add_(1.0)
    save_hf(model, folder)
    assert_same_parameters(from_hf(folder), model)
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["bert"]


def test_a_save_that_fails_leaves_the_old_model_and_no_other_files(model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    for target in (folder, folder.parent / "other"):
        with pytest.raises(OSError, match=r"No space left.*model\.safetensors"):
            save_hf(model, target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["bert"]


@pytest.mark.parametrize("moved", [0, 1])
def test_a_save_cut_short_while_replacing_cannot_be_loaded(model, folder, monkeypatch, moved):
    replace, moves = pathlib.Path.replace, []

    def killed(self, target):
        if len(moves) == moved:
            raise KeyboardInterrupt
        moves.append(replace(self, target))

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_hf(model, folder)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        from_hf(folder)


def test_files_have_the_permissions_of_the_umask(model, tmp_path):
    previous = os.umask(0o027)
    try:
        save_hf(model, tmp_path / "bert")
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "bert").iterdir()} == {0o640}


def test_a_name_is_not_downloaded():
    with pytest.raises(ValueError, match=r"bert-base-uncased is not a folder.*hf download"):
        from_hf("google-bert/bert-base-uncased")


def test_a_source_of_another_type(model):
    for source, name in ((torch.nn.Linear(2, 2), "Linear"), (model, "BertForPreTraining"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"source must be a folder or a Transformers model; got {name}"):
            from_hf(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert'; got 'roberta'"),
        ({"hidden_act": "gelu_new"}, "hidden_act must be 'gelu'; got 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads must be"),
        ({"quantization_config": {"bits": 8}}, "quantization_config must be None"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps must be a positive number"),
    ],
)
def test_settings_of_another_arithmetic(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        from_hf(folder)


def test_every_tensor_that_does_not_fit_is_listed_at_once(folder):
    def spoil(tensors):
        del tensors["bert.encoder.layer.1.attention.self.key.bias"]
        tensors["classifier.weight"] = torch.zeros(2, 32)
        tensors["bert.embeddings.word_embeddings.weight"] = torch.zeros(60, 32)
        tensors["cls.seq_relationship.bias"] = torch.zeros(2, dtype=torch.int64)
        tensors["cls.predictions.decoder.weight"] = torch.zeros(61, 32)
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1

    change_tensors(folder, spoil)
    with pytest.raises(ValueError, match="does not hold a BertForPreTraining") as caught:
        from_hf(folder)
    for line in (
        "bert.encoder.layer.1.attention.self.key.bias is missing",
        "classifier.weight is unknown",
        "bert.embeddings.word_embeddings.weight has shape (60, 32), but the configuration needs (61, 32)",
        "cls.seq_relationship.bias has dtype torch.int64, not a floating-point dtype",
        "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias differs from cls.predictions.bias",
    ):
        assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_list_is_cut(folder):
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(ValueError, match="and 22 more"):
        from_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "1000000000 layers, and there are only"),
        ({"hidden_size": 10**9}, "overflowed"),
        ({"hidden_size": 10**6}, r"has shape \(61, 32\), but the configuration needs \(61, 1000000\)"),
        ({"hidden_size": 2 * 10**30}, "cannot build"),
        ({"intermediate_size": 10**9}, r"needs \(1000000000, 32\)"),
        ({"vocab_size": 10**9}, r"needs \(1000000000, 32\)"),
        ({"max_position_embeddings": 10**9}, r"needs \(1000000000, 32\)"),
        ({"initializer_range": 10**400}, "cannot build"),
    ],
)
def test_sizes_are_compared_before_anything_is_allocated(folder, change, message):
    change_config(folder, **change)
    most = 64 << 20  # bytes on top of what is mapped now
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + most, before[1]))
    try:
        with pytest.raises(ValueError, match=message) as caught:
            from_hf(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "4300"),
        (b" " * (17 << 20), "longer than 16 MiB"),
        (b"\xff", "utf-8"),
        (None, "not a regular file"),
    ],
    ids=["deep", "5,000 digits", "long", "not UTF-8", "FIFO"],
)
def test_a_config_that_no_one_wrote(folder, content, reason):
    config = folder / "config.json"
    config.unlink()
    os.mkfifo(config) if content is None else config.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json is damaged: .*{reason}") as caught:
        from_hf(folder)
    assert "\n" not in str(caught.value)


def test_half_a_head_is_not_a_missing_head(folder):
    change_tensors(folder, lambda tensors: tensors.pop("cls.predictions.transform.dense.weight"))
    with pytest.raises(ValueError, match=r"cls\.predictions\.transform\.dense\.weight is missing"):
        from_hf(folder)


def test_damaged_and_missing_files(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        from_hf(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        from_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pickle, which can run code.*save_pretrained"):
        from_hf(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        from_hf(folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        from_hf(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        from_hf(folder)


@pytest.mark.parametrize("weight_map", [{"a": "../model.safetensors"}, {"a": 3}, None])
def test_an_index_cannot_point_out_of_its_folder(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        from_hf(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-1\.safetensors is missing"):
        from_hf(folder)


def test_saving_something_else_or_over_a_file(model, tmp_path):
    with pytest.raises(TypeError, match=r"got DataParallel.*\.module"):
        save_hf(torch.nn.DataParallel(model), tmp_path / "bert")
    (tmp_path / "bert").write_text("a file")
    with pytest.raises(ValueError, match="bert is a file"):
        save_hf(model, tmp_path / "bert")


def test_a_config_of_ours_is_a_config_of_theirs(tmp_path):
    """Values away from the defaults arrive, None among them."""
    transformers = pytest.importorskip("transformers")
    config = BertConfig(33, 48, 1, 3, 20, "gelu", 0.25, 0.0, 12, 3, 0.5, 1e-5, None)
    save_hf(BertForPreTraining(config), tmp_path / "bert")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "bert")
    assert {name: getattr(theirs, name) for name in config.__dataclass_fields__} == dataclasses.asdict(config)
    assert from_hf(tmp_path / "bert").config == config
