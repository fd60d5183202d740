"""Every example of docs/drop-in.md runs unchanged, in a folder with tiny models of the names it uses."""

import re
from pathlib import Path

import pytest
import torch
from hf_families import DISTIL, MODERN, SIZES, TEXT, VIT

transformers = pytest.importorskip("transformers", minversion="5")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "drop-in.md"
RECIPES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", DOCS.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = tmp_path_factory.mktemp("recipes")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))
    fast.save_pretrained(place / "my-bert")
    for folder, name, fields in (
        ("my-bert", "BertForMaskedLM", TEXT),
        ("my-roberta", "RobertaForMaskedLM", {**TEXT, "pad_token_id": 0}),
        ("my-electra", "ElectraForMaskedLM", {**TEXT, "embedding_size": 16}),
        ("my-distilbert", "DistilBertForMaskedLM", DISTIL),
        ("my-modernbert", "ModernBertForMaskedLM", {**TEXT, **MODERN}),
        ("my-bidirectional-qwen3", "Qwen3Model", {**TEXT, "head_dim": 16, "is_causal": False}),
        ("my-vit", "ViTForImageClassification", {**SIZES, **VIT}),
    ):
        cls = getattr(transformers, name)
        cls(cls.config_class(**fields)).save_pretrained(place / folder)
    return place


def test_every_code_block_is_a_recipe():
    """The pattern above finds all of them, one a section."""
    assert len(RECIPES) == DOCS.read_text().count("```python") >= 9


@pytest.mark.parametrize(("title", "code"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipe(title, code, models, monkeypatch):
    if "sentence_transformers" in code:
        pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(models)
    torch.manual_seed(0)
    exec(compile(code, f"{DOCS.name}: {title}", "exec"), {"__name__": "__main__"})
