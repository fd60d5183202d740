"""Fine-tuning a sentence encoder: mean pooling over a padded batch, with padding removed inside the encoder.

With a stand-in for the structure of sentence_transformers, which needs no tokenizer, and with the library if installed.
"""

import copy

import pytest
import torch
from hf_families import LinearInputs, batch, build, flat
from oracle import DEVICE, assert_as_good_as_torch
from torch import nn

from fusebert.kernels import use_backend
from fusebert.model import fuse, unfuse

transformers = pytest.importorskip("transformers", minversion="5")


class Transformer(nn.Module):
    """The first module: features in, ``token_embeddings`` beside them out."""

    def __init__(self, auto_model):
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features):
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        return {**features, "token_embeddings": self.auto_model(**inputs, return_dict=True).last_hidden_state}


class Pooling(nn.Module):
    """The second: the mean of the real tokens."""

    def forward(self, features):
        mask = features["attention_mask"].unsqueeze(-1).to(features["token_embeddings"].dtype)
        total = (features["token_embeddings"] * mask).sum(1)
        return {**features, "sentence_embedding": total / mask.sum(1).clamp_min(1e-9)}


def contrastive(model):
    """The contrastive loss of two batches of sentences, and its gradients."""
    pair = [batch("bert", lengths, seed) for lengths, seed in (((17, 3, 11), 0), ((9, 2, 6), 1))]
    a, b = (nn.functional.normalize(model(features)["sentence_embedding"], dim=1) for features in pair)
    loss = nn.functional.cross_entropy(a @ b.T * 20, torch.arange(3, device=DEVICE))
    model.zero_grad()
    loss.backward()
    return loss.detach(), flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("family", ["bert", "modernbert-model"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_stand_in(family, backend):
    encoder = build("bert") if family == "bert" else build("modernbert").model
    model = nn.Sequential(Transformer(encoder), Pooling()).train()
    theirs = contrastive(model)
    oracle = contrastive(copy.deepcopy(model).double())
    report = fuse(model, unpad=True)
    assert not report.left
    assert report.replaced[0].name == "0.auto_model"
    assert any("packed" in entry.by for entry in report.replaced)
    with use_backend(backend), LinearInputs() as linears:
        ours = contrastive(model)
    assert list(dict.fromkeys(size for size in linears.sizes if size[0] == 1)) == [(1, 17 + 3 + 11), (1, 9 + 2 + 6)]
    assert_as_good_as_torch(ours[0], oracle[0], theirs[0], "loss", roundings=8)
    assert_as_good_as_torch(ours[1], oracle[1], theirs[1], "gradients")
    unfuse(model)
    assert torch.equal(contrastive(model)[1], theirs[1])


def test_the_library_itself(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    build("bert").save_pretrained(tmp_path / "bert")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))])
    )
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device=DEVICE)
    texts = ["a b c d e f g h", "a", "x y z"]
    before = model.encode(texts, convert_to_tensor=True)
    report = fuse(model, unpad=True)
    assert any("packed" in entry.by for entry in report.replaced)
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), before, rtol=1e-4, atol=1e-5)
    model.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device=DEVICE)
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), before, rtol=1e-4, atol=1e-5)
