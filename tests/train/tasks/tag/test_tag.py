"""`finetune --task tag` learns, continues to the bit, exports what Transformers loads, and predicts as in training."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lines_of
from stopped_runs import StopAfter

from fusebert.train.run.signals import Interrupted, StopSignal
from fusebert.train.tasks.finetune import finetune
from fusebert.train.tasks.settings import FinetuneSettings
from fusebert.train.tasks.tag.sentences import TagColumns, read_sentences

Fusebert = Callable[..., int]


def settings_of(place: Path, out: str) -> FinetuneSettings:
    return FinetuneSettings(
        model=place / "model",
        task="tag",
        train=[str(place / "train.conll")],
        dev=str(place / "dev.conll"),
        out=place / out,
        lr=2e-3,
        batch_size=8,
        layer_decay=0.9,
    )


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    settings = dataclasses.replace(settings_of(place, "entities"), test=str(place / "dev.conll"))
    finetune(settings, StopSignal(), "")
    return settings.out


def test_it_learns_and_reports(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert list(report["scores"]) == ["f1", "precision", "recall", "accuracy", "loss"]
    assert report["scores"]["f1"]["mean"] > 0.95
    assert report["metric"] == "f1"
    assert [each["class"] for each in report["classes"]] == ["ANIMAL", "PLACE"]
    assert [each["entities"] for each in report["classes"]] == [40, 40]
    assert report["test"]["seeds"] == [report["seeds"][0]["scores"]]
    page = (run / "report.html").read_text()
    assert "Types of entities" in page
    assert "]ANIMAL lives in the [" in page
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_are_those_of_training_and_transformers(run: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    out = tmp_path / "tags.jsonl"
    assert fusebert("predict", "--model", run / "hf", "--input", "dev.conll", "--out", out) == 0
    found, given = lines_of(out), list(read_sentences("dev.conll", TagColumns()))
    assert [each["tokens"] for each in found] == [each.words for each in given]
    tags = np.concatenate([each["tags"] for each in found])
    accuracy = np.mean(tags == np.concatenate([each.tags for each in given]))
    report = json.loads((run / "report.json").read_text())
    assert accuracy == pytest.approx(report["seeds"][0]["scores"]["accuracy"])
    for each in found:
        for entity in each["entities"]:
            assert each["tags"][entity["start"]] == f"B-{entity['type']}"
            assert set(each["tags"][entity["start"] + 1 : entity["end"]]) <= {f"I-{entity['type']}"}
    model, tokenizer = (each.from_pretrained(run / "hf") for each in (AutoModelForTokenClassification, AutoTokenizer))
    assert set(model.config.id2label.values()) == {"O", "B-ANIMAL", "I-ANIMAL", "B-PLACE"}
    for each in found[:10]:
        inputs = tokenizer(each["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1)
        words = inputs.word_ids()
        assert each["tags"] == [model.config.id2label[int(best[words.index(i)])] for i in range(len(each["tokens"]))]


def test_plain_texts_and_long_ones(run: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    long = "The young owl lives in the tower . " * 40
    (tmp_path / "a.txt").write_text(f"The owl lives in the tower.\n\n{long}\n\x01\n")
    out = tmp_path / "tags.jsonl"
    words = ["--seqlen", "24", "--stride", "10"]
    assert fusebert("predict", "--model", run / "hf", "--input", tmp_path / "a.txt", "--out", out, *words) == 0
    first, empty, whole, control = lines_of(out)
    assert first["tokens"][-2:] == ["tower", "."]
    assert empty == {"tokens": [], "tags": [], "entities": []}
    assert len(whole["tags"]) == 8 * 40
    assert sum(each["type"] == "ANIMAL" for each in whole["entities"]) >= 36
    assert control == {"tokens": ["\x01"], "tags": ["O"], "entities": []}


@pytest.mark.parametrize("steps", [4, 15])  # of 15 in an epoch
def test_a_continued_run_has_the_same_bits(run: Path, place: Path, steps: int) -> None:
    settings = dataclasses.replace(settings_of(place, f"tags-stopped-{steps}"), resume=True)
    with pytest.raises(Interrupted):
        finetune(settings, StopAfter(steps), "")
    finetune(settings, StopSignal(), "")
    names = ("hf/model.safetensors", "hf/config.json", "seed-0/hf/tokenizer.json")
    assert all((settings.out / name).read_bytes() == (run / name).read_bytes() for name in names)


def test_tags_without_spans_and_frozen_layers(place: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    """Parts of speech: accuracy and macro F1 of words. A word without a token is wrong, and has no prediction."""
    kinds = {"The": "DET", "the": "DET", "lives": "VERB", "in": "ADP", ".": "PUNCT", "young": "ADJ", "\x01": "X"}
    for name in ("train", "dev"):
        rows = [
            {"words": [*each.words, "\x01"], "pos": [kinds.get(word, "NOUN") for word in [*each.words, "\x01"]]}
            for each in read_sentences(str(place / f"{name}.conll"), TagColumns())
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--train", tmp_path / "train.jsonl", "--dev", tmp_path / "dev.jsonl", "--text", "words", "--label", "pos"]
    options = ["--lr", "2e-3", "--batch-size", "8", "--freeze-layers", "1", "--seqlen", "6", "--stride", "2"]
    out = tmp_path / "run"
    assert fusebert("finetune", "--model", "model", "--task", "tag", *data, *options, "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["scores"]) == ["accuracy", "macro_f1", "loss"]
    words = sum(each["words"] for each in report["classes"])
    assert report["scores"]["accuracy"]["mean"] == pytest.approx(1 - 40 / words)  # all but the 40 without a token
    assert report["scores"]["macro_f1"]["mean"] == pytest.approx(6 / 7)
    found = tmp_path / "found.jsonl"
    assert json.loads((out / "hf" / "config.json").read_text())["stride"] == 2
    given = ["--input", tmp_path / "dev.jsonl", "--text", "words", "--out", found]  # --seqlen, --stride as in training
    assert fusebert("predict", "--model", out / "hf", *given) == 0
    expected = lines_of(tmp_path / "dev.jsonl")
    for one, other in zip(lines_of(found), expected, strict=True):
        assert one == {"tokens": other["words"], "tags": [*other["pos"][:-1], None]}


MISTAKES = {
    "class weights": (["--class-weights", "balanced"], "--class-weights is for --task classify; got --task tag"),
    "separator": (["--label-separator", ";"], "--label-separator is for --task classify; got --task tag"),
    "pair": (["--text-pair", "b"], "--text-pair is for --task classify, regress, embed; got --task tag"),
    "metric": (["--metric", "mcc"], "choose one of auto, f1, precision, recall, accuracy, loss"),
    "stride": (["--seqlen", "10", "--stride", "8"], "--stride must be from 0 to 7"),
    "unknown tag": (["--dev", "other.conll"], "other.conll:2: the tag 'B-FOOD' is not in the training files"),
    "nothing": (["--dev", "blank.conll"], "--dev blank.conll has no sentences"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, place: Path, fusebert: Fusebert, capsys, tmp_path: Path) -> None:
    words, expected = MISTAKES[name]
    (place / "other.conll").write_text("The X O\nbread X B-FOOD\n")
    (place / "blank.conll").write_text("\n\n")
    given = ["--model", "model", "--task", "tag", "--out", tmp_path / "run", "--train", "train.conll"]
    assert fusebert("finetune", *given, "--dev", "dev.conll", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert expected in line
