"""A sentence encoder of each family is written as the family's own encoder, and read again."""

import json
from pathlib import Path

import pytest
import torch
from hf_families import build

from fusebert.model.heads import SentenceEncoder
from fusebert.model.hf.encoders import load_weights, open_encoder
from fusebert.model.hf.save_sentence_encoder import save_sentence_encoder

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.mark.parametrize("family", ["bert", "bert-classification", "roberta", "electra", "distilbert"])
def test_the_encoder_is_the_familys(family: str, tmp_path: Path) -> None:
    theirs = build(family).cpu()
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_encoder(tmp_path / "theirs")
    ours = SentenceEncoder(source.config, "cls", source.embedding_size)
    load_weights(ours, source)
    save_sentence_encoder(ours, tmp_path / "ours", source, {}, seqlen=20, normalize=False)
    written, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all("pooler" in name for name in info["missing_keys"])  # a masked LM has none
    expected = getattr(theirs, theirs.base_model_prefix, theirs).state_dict()
    for name, tensor in written.state_dict().items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name].cpu(), rtol=0.0, atol=0.0)
    modules = json.loads((tmp_path / "ours" / "modules.json").read_text())
    assert [each["path"] for each in modules] == ["", "1_Pooling"]
    again = SentenceEncoder(source.config, "cls", source.embedding_size)
    load_weights(again, open_encoder(tmp_path / "ours"))
    for one, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_older_folder_is_replaced(tmp_path: Path) -> None:
    build("bert").cpu().save_pretrained(tmp_path / "theirs")
    source = open_encoder(tmp_path / "theirs")
    for pooling in ("mean", "max"):
        model = SentenceEncoder(source.config, pooling)
        load_weights(model, source)
        save_sentence_encoder(model, tmp_path / "ours", source, {}, seqlen=20, normalize=True)
        content = json.loads((tmp_path / "ours" / "1_Pooling" / "config.json").read_text())
        assert [name for name, value in content.items() if value is True] == [f"pooling_mode_{pooling}_tokens"]
    assert (tmp_path / "ours" / "2_Normalize" / "config.json").is_file()
