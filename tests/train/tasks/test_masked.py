"""fill, evaluate and summarize against plain computations with Transformers' model."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fusebert.train.tasks.evaluate_model import evaluate_model
from fusebert.train.tasks.fill import fill
from fusebert.train.tasks.settings import EvaluateSettings, FillSettings
from fusebert.train.tasks.summarize import central_sentences

Fusebert = Callable[..., int]


@pytest.fixture(scope="module")
def theirs(place: Path) -> tuple[object, object]:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM.from_pretrained(place / "model").eval()
    return model, transformers.AutoTokenizer.from_pretrained(place / "model")


@torch.no_grad()
def test_fill_gives_the_probabilities_of_transformers(place: Path, theirs) -> None:
    model, tokenizer = theirs
    texts = ["The [MASK] lives in the forest.", "In the [MASK] it finds [MASK] every day."]
    (place / "masked.txt").write_text("\n".join(texts))
    results, _ = fill(FillSettings(model=place / "model", input=str(place / "masked.txt"), top=3))
    for text, filled in zip(texts, results, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        at = inputs["input_ids"][0] == tokenizer.mask_token_id
        best = model(**inputs).logits[0, at].softmax(-1).topk(3)
        assert filled.text == text
        assert [[token for token, _ in mask] for mask in filled.masks] == [
            [tokenizer.decode([i]) for i in ids] for ids in best.indices.tolist()
        ]
        np.testing.assert_allclose([[p for _, p in mask] for mask in filled.masks], best.values, rtol=1e-4)
        assert "[MASK]" not in filled.filled


def test_fill_prints_or_writes(fusebert: Fusebert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fusebert("fill", "--model", "model", "the <mask> sat", "--top", 2) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("the ")
    assert second.count("%") == 2
    assert fusebert("fill", "--model", "model", "the [MASK] sat", "--out", tmp_path / "g.jsonl") == 0
    (record,) = map(json.loads, (tmp_path / "g.jsonl").read_text().splitlines())
    assert len(record["masks"][0]) == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give one text, or a file of texts with --input"),
        (["no gap"], "the text has no [MASK]"),
        (["--input", "texts.txt"], "texts.txt:1 has no [MASK]"),
        (["a b c d [MASK]", "--seqlen", "5"], "has a [MASK] after the first 5 tokens"),
        (["[MASK]", "--top", "0"], "--top must be from 1"),
    ],
)
def test_mistakes_of_fill(words: list[str], expected: str, fusebert: Fusebert, capsys) -> None:
    assert fusebert("fill", "--model", "model", *words) == 2
    assert expected in capsys.readouterr().err


@torch.no_grad()
def test_pseudo_perplexity_is_that_of_masking_each_token(place: Path, theirs) -> None:
    model, tokenizer = theirs
    texts = ["The fox lives in the forest.", "Berries in the meadow."]
    (place / "two.txt").write_text("\n".join(texts))
    total = count = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for i in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, i] = tokenizer.mask_token_id
            total -= float(model(input_ids=masked).logits[0, i].log_softmax(-1)[ids[0, i]])
            count += 1
    result, _ = evaluate_model(EvaluateSettings(model=place / "model", text=str(place / "two.txt")))
    assert result.pseudo_tokens == count
    assert result.pseudo_perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert result.masked.num_masked == sum(max(1, round(0.15 * n)) for n in lengths)


def test_evaluate_on_a_corpus(fusebert: Fusebert, place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "figures.json"
    assert fusebert("evaluate", "--model", "model", "--data", "corpus", "--pseudo", 1, "--out", out) == 0
    figures = json.loads(out.read_text())
    vocabulary = json.loads((place / "model" / "config.json").read_text())["vocab_size"]
    assert figures["mlm_loss"] == pytest.approx(math.log(vocabulary), rel=0.05)  # it is untrained
    assert figures["nsp_accuracy"] is not None
    assert figures["pseudo_tokens"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert fusebert("evaluate", "--model", "model", "--data", "corpus", "--pseudo", 0, "--out", out) == 0
    assert json.loads(out.read_text()) == {**figures, "pseudo_perplexity": None, "pseudo_tokens": 0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give a corpus with --data or a file of texts with --text"),
        (["--text", "empty.txt"], "empty.txt has no texts"),
        (["--text", "texts.tsv"], "no column 'text'"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--text", "texts.txt", "--seed", "-1"], "--pseudo and --seed must be 0 or more"),
    ],
)
def test_mistakes_of_evaluate(words: list[str], expected: str, fusebert: Fusebert, place: Path, capsys) -> None:
    (place / "empty.txt").write_text("")
    assert fusebert("evaluate", "--model", "model", *words) == 2
    assert expected in capsys.readouterr().err


def test_central_sentences() -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[[0, 3]] += vectors[2] * 2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert central_sentences(vectors, 1).tolist() == [2]
    assert central_sentences(vectors, 3).tolist() == [0, 2, 3]
    assert central_sentences(vectors, 9).tolist() == [0, 1, 2, 3]


def test_summarize(fusebert: Fusebert, place: Path, tmp_path: Path, capsys) -> None:
    document = "\n".join(["The fox lives here.", "The fox lives here.", "An owl!", "Berries grow.", "It rains."])
    (place / "documents.txt").write_text(f"{document}\n\nOne only.\n")
    out = tmp_path / "s.jsonl"
    words = ["summarize", "--model", "model", "--input", "documents.txt", "--splitter", "lines", "--sentences", 2]
    assert fusebert(*words, "--out", out) == 0
    first, second = (json.loads(line)["summary"] for line in out.read_text().splitlines())
    assert len(first) == 2
    assert [line for line in dict.fromkeys(document.splitlines()) if line in first] == first
    assert second == ["One only."]
    assert fusebert(*words) == 0
    assert capsys.readouterr().out == "\n".join([*first, "", *second]) + "\n"
    assert fusebert(*words[:-1], 0) == 2
