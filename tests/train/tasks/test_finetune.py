"""Fine-tuning learns, is Transformers' to 1e-4, continues to the bit, and exports what Transformers loads."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lines_of
from safetensors.torch import load_file
from stopped_runs import StopAfter

from fusebert.model.config import BertConfig
from fusebert.model.heads import SequenceClassifier
from fusebert.model.hf.encoders import open_encoder
from fusebert.model.hf.save_classifier import copied_tokenizer, save_classifier
from fusebert.train.run.signals import Interrupted, StopSignal
from fusebert.train.step.optim import make_optimizer, set_learning_rate
from fusebert.train.tasks.class_report import LabelPredictions
from fusebert.train.tasks.classifier import make_classifier
from fusebert.train.tasks.finetune import finetune
from fusebert.train.tasks.finetune_report import write_report
from fusebert.train.tasks.labels import Labels
from fusebert.train.tasks.rows import Row
from fusebert.train.tasks.scores import goodness, scores
from fusebert.train.tasks.settings import FinetuneSettings

Fusebert = Callable[..., int]
CLASSIFY = ["--task", "classify", "--train", "train.tsv", "--dev", "dev.tsv", "--batch-size", "8"]


@pytest.fixture(scope="module")
def topics(place: Path) -> Path:
    """A run that classifies, with two seeds."""
    settings = FinetuneSettings(
        model=place / "model",
        task="classify",
        train=[str(place / "train.tsv")],
        dev=str(place / "dev.tsv"),
        out=place / "topics",
        lr=2e-3,
        batch_size=8,
        seeds=2,
    )
    outcome = finetune(settings, StopSignal(), "")
    assert [result["seed"] for result in outcome.results] == [0, 1]
    return settings.out


def test_it_learns_and_reports_mean_and_spread(topics: Path) -> None:
    report = json.loads((topics / "report.json").read_text())
    found = [each["scores"]["accuracy"] for each in report["seeds"]]
    assert min(found) > 0.9
    assert report["scores"]["accuracy"]["mean"] == pytest.approx(np.mean(found))
    assert report["scores"]["accuracy"]["stdev"] == pytest.approx(np.std(found, ddof=1))
    best = topics / f"seed-{report['best_seed']}" / "hf" / "model.safetensors"
    assert best.read_bytes() == (topics / "hf" / "model.safetensors").read_bytes()
    classes = {each["class"]: each["texts"] for each in report["classes"]}
    labels = [line.split("\t")[1] for line in (topics.parent / "dev.tsv").read_text().splitlines()[1:]]
    assert classes == {name: labels.count(name) for name in ("fox", "hare", "owl")}
    kinds = {record["kind"] for record in lines_of(topics / "seed-0" / "log.jsonl")}
    assert kinds == {"run", "finetune", "dev"}


def test_the_page_shows_plots_and_texts_and_runs_none_of_them(tmp_path: Path) -> None:
    rows = [Row(str(i), text) for i, text in enumerate(["<script>right()</script>", "a & wrong"])]
    labels = Labels("single_label_classification", ("$\\frac{$", "no"))
    logits = np.array([[9.0, 0.0], [5.0, 1.0]], dtype=np.float32)
    best = LabelPredictions(labels, rows, torch.tensor([0, 1]), logits)
    write_report(tmp_path, "a run", [], (["", "accuracy"], [["seed 0", 0.5]]), best)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page
    wrong, right = page.index("Wrong, most"), page.index("Right, least")
    assert wrong < page.index("a &amp; wrong") < right < page.index("&lt;script&gt;right()")
    assert "98%" in page[wrong:right]


def test_predictions_are_transformers_in_the_order_of_the_texts(topics: Path, fusebert: Fusebert, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        each.from_pretrained(topics / "hf") for each in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert model.config.problem_type == "single_label_classification"
    out = tmp_path / "labels.jsonl"
    assert fusebert("predict", "--model", topics / "hf", "--input", "dev.tsv", "--out", out) == 0
    rows = [line.split("\t") for line in Path("dev.tsv").read_text().splitlines()[1:]]
    inputs = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)
    found = lines_of(out)
    names = [model.config.id2label[i] for i in range(3)]
    assert names == ["fox", "hare", "owl"]
    given = torch.tensor([[each["probabilities"][name] for name in names] for each in found])
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    right = np.mean([each["label"] == label for each, (_, label) in zip(found, rows, strict=True)])
    report = json.loads((topics / "report.json").read_text())
    assert right == report["seeds"][report["best_seed"]]["scores"]["accuracy"]


def test_test_texts_are_scored_once_with_the_best_models(topics: Path, fusebert: Fusebert, capsys, tmp_path) -> None:
    """The dev texts of each fox are tests: what `predict` says of them, for each seed."""
    lines = Path("dev.tsv").read_text().splitlines()
    Path("test.tsv").write_text("\n".join([lines[0], *(line for line in lines[1:] if line.endswith("fox")), lines[1]]))
    finished = tmp_path / "topics"
    shutil.copytree(topics, finished)
    assert fusebert("finetune", "--out", finished, "--resume", "--test", "test.tsv") == 0
    assert "on the test texts, mean ± standard deviation of 2 seeds" in capsys.readouterr().out
    report = json.loads((finished / "report.json").read_text())
    rows = [line.split("\t") for line in Path("test.tsv").read_text().splitlines()[1:]]
    for seed in (0, 1):
        out = tmp_path / "labels.jsonl"
        words = ["--model", finished / f"seed-{seed}" / "hf", "--input", "test.tsv", "--out", out]
        assert fusebert("predict", *words) == 0
        right = np.mean([each["label"] == label for each, (_, label) in zip(lines_of(out), rows, strict=True)])
        assert report["test"]["seeds"][seed]["accuracy"] == pytest.approx(right)
        assert report["seeds"][seed] == json.loads((topics / f"seed-{seed}" / "result.json").read_text())
    assert "seed 1, test" in (finished / "report.html").read_text()
    assert json.loads((topics / "report.json").read_text())["test"] is None


def test_out_and_resume_are_enough(topics: Path, place: Path, fusebert: Fusebert, capsys, tmp_path: Path) -> None:
    words = ["--model", "model", *CLASSIFY, "--lr", "0.002", "--epochs", "1", "--out", tmp_path / "run"]
    assert fusebert("finetune", *words) == 0
    assert fusebert("finetune", "--out", tmp_path / "run", "--resume", "--seeds", "2") == 0
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["settings"]["lr"] == 0.002
    assert content["settings"]["epochs"] == 1
    assert len(json.loads((tmp_path / "run" / "report.json").read_text())["seeds"]) == 2
    assert fusebert("finetune", "--out", tmp_path / "nothing", "--resume") == 2
    assert "Missing option" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [4, 15])  # of 15 in an epoch
def test_a_continued_run_has_the_same_bits(topics: Path, place: Path, steps: int) -> None:
    settings = FinetuneSettings(
        model=place / "model",
        task="classify",
        train=[str(place / "train.tsv")],
        dev=str(place / "dev.tsv"),
        out=place / f"stopped-{steps}",
        lr=2e-3,
        batch_size=8,
        resume=True,
    )
    with pytest.raises(Interrupted, match="go on with:\nthis command"):
        finetune(settings, StopAfter(steps), "this command")
    assert list(settings.out.glob("seed-0/checkpoints/step-*"))
    assert not (settings.out / "hf").exists()
    finetune(settings, StopSignal(), "")
    assert (settings.out / "hf" / "model.safetensors").read_bytes() == (
        topics / "seed-0" / "hf" / "model.safetensors"
    ).read_bytes()
    before, after = (
        [r for r in lines_of(out / "seed-0" / "log.jsonl") if r["kind"] == "dev"] for out in (topics, settings.out)
    )
    assert before == after


MISTAKES = {
    "task": (["--task", "guess"], "--task must be one of classify, regress, tag, qa, embed; got 'guess'"),
    "no file": (["--train", "none.tsv"], "none.tsv does not exist"),
    "unknown label": (["--dev", "other.tsv"], "other.tsv:3: the label 'whale' is not in the training files"),
    "no number": (["--task", "regress"], "train.tsv:2: the label 'owl' is not a number"),
    "one class": (["--train", "one.tsv"], "no two classes to tell apart, only fox"),
    "not classes": (["--train", "many.tsv"], "60 different labels in 60 rows are not classes"),
    "metric": (["--metric", "pearson"], "choose one of auto, accuracy, macro_f1, mcc, loss"),
    "epochs": (["--epochs", "1000000"], "--epochs must be from 1 to 10,000; got 1,000,000"),
    "lr": (["--lr", "0"], "--lr must be above 0"),
    "weights": (["--class-weights", "dog=2"], "is not NAME=NUMBER with one of the classes fox, hare, owl"),
    "layers": (["--freeze-layers", "3"], "--freeze-layers must be from 0 to 2"),
    "no rows": (["--train", "empty.tsv"], "--train empty.tsv has no rows"),
    "a run": (["--out", "topics"], "topics already holds a run: give --resume"),
    "other options": (
        ["--out", "topics", "--resume"],
        "cannot be continued with another --lr (0.002 there, 0.01 here)",
    ),
}


@pytest.fixture(scope="module")
def mistakes(place: Path, topics: Path) -> None:
    (place / "other.tsv").write_text("text\tlabel\nThe fox.\tfox\nThe whale.\twhale\n")
    (place / "one.tsv").write_text("text\tlabel\nThe fox.\tfox\nThe fox.\tfox\n")
    (place / "many.tsv").write_text("text\tlabel\n" + "".join(f"fox\t{i / 7}\n" for i in range(60)))
    (place / "empty.tsv").write_text("text\tlabel\n")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, fusebert: Fusebert, mistakes: None, capsys, tmp_path: Path) -> None:
    words, expected = MISTAKES[name]
    given = ["--model", "model", "--out", tmp_path / "run", *CLASSIFY, "--lr", "0.01"]
    option = words[0]
    if option == "--train":
        given = [word for i, word in enumerate(given) if "--train" not in (word, given[i - 1])]
    assert fusebert("finetune", *given, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert expected in line


def test_frozen_layers_keep_their_weights_and_no_others(place: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--freeze-layers", "1", "--layer-decay", "0.5", "--class-weights", "balanced", "--epochs", "1"]
    assert fusebert("finetune", "--model", "model", "--out", out, *CLASSIFY, *words) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (place / "model", out / "hf"))
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    frozen = {name for name in after if "embeddings" in name or "layer.0." in name}
    assert same == frozen


def test_each_layer_learns_at_its_rate() -> None:
    model, rates = SequenceClassifier(BertConfig.preset("tiny", 50), 2), {}
    optimizer = make_optimizer(model, 1.0, 0.01, layer_decay=0.5)
    set_learning_rate(optimizer, 0.8)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = group["lr"]
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)
    assert rates.keys() == set(names.values())
    parts = {"out.": 0.8, "dense.": 0.8, "encoder.layers.1": 0.4, "encoder.layers.0": 0.2, "encoder.embeddings": 0.1}
    for name, rate in rates.items():
        (expected,) = [each for part, each in parts.items() if name.startswith(part)]
        assert rate == pytest.approx(expected), name


LABELLED = [Row(f"a.tsv:{i}", "", label=label) for i, label in enumerate(["10", 9, "b;10", 9.0], 1)]


@pytest.mark.parametrize(
    ("rows", "task", "separator", "names", "encoded"),
    [
        ([0, 1, 3], "classify", None, ("9", "10"), [1, 0, 0]),
        ([0, 2], "classify", None, ("10", "b;10"), [0, 1]),
        ([0, 1, 2], "classify", ";", ("10", "9", "b"), [[1, 0, 0], [0, 1, 0], [1, 0, 1]]),
        ([0, 1, 3], "regress", None, ("LABEL_0",), [10.0, 9.0, 9.0]),
    ],
)
def test_labels(rows, task, separator, names, encoded) -> None:
    given = [LABELLED[i] for i in rows]
    labels = Labels.of(given, task, separator)
    assert labels.names == names
    assert labels.encode(given).tolist() == encoded


def test_a_fine_tuned_model_keeps_its_classes() -> None:
    rows = LABELLED[:2]
    assert Labels.of(rows, "classify", None, known=["x", "10", "9"]).names == ("x", "10", "9")
    assert Labels.of(rows, "classify", None, known=["x", "10"]).names == ("9", "10")


def test_scores_are_those_of_the_definitions() -> None:
    single = Labels("single_label_classification", ("a", "b"))
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    found = scores(single, logits, torch.tensor([0, 1, 1, 1]))  # tp 2, tn 1, fn 1, fp 0
    assert found["accuracy"] == 0.75
    assert found["mcc"] == pytest.approx(2 / math.sqrt(12))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    several = Labels("multi_label_classification", ("a", "b"))
    multi = scores(several, logits - 0.5, torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]]))
    assert multi["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert multi["accuracy"] == 0.5
    regression = Labels("regression", ("LABEL_0",))
    number = scores(regression, logits[:, :1], torch.tensor([4.0, 0.5, 6.0, 0.0]))
    assert number["pearson"] == pytest.approx(np.corrcoef([2, 0, 3, 0], [4, 0.5, 6, 0])[0, 1])
    assert number["rmse"] == pytest.approx(math.sqrt((4 + 0.25 + 9) / 4))
    constant = scores(regression, np.ones((3, 1), dtype=np.float32), torch.tensor([1.0, 2.0, 3.0]))
    assert math.isnan(constant["pearson"])
    assert goodness("pearson", constant) < goodness("pearson", number)
    assert goodness("loss", {"loss": 0.1}) > goodness("loss", {"loss": 0.2})
    assert goodness("accuracy", {"accuracy": 1.0, "loss": 0.1}) > goodness("accuracy", {"accuracy": 1.0, "loss": 0.2})


def test_patience_ends_a_run_that_does_not_improve(fusebert: Fusebert, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--patience", "1", "--epochs", "9", "--metric", "accuracy", "--lr", "1e-15", "--freeze-layers", "2"]
    assert fusebert("finetune", "--model", "model", "--out", out, *CLASSIFY, *words) == 0
    result = json.loads((out / "seed-0" / "result.json").read_text())
    assert result["best_step"] == 15
    assert result["steps"] == 30


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_predictions_of_several_classes_and_of_a_value(problem: str, place: Path, fusebert: Fusebert, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = ("x", "y", "z") if problem.startswith("multi") else ("LABEL_0",)
    source = open_encoder(place / "model")
    torch.manual_seed(0)
    model, _ = make_classifier(source, Labels(problem, names))
    model.out.bias.data += torch.tensor([1.0, -1.0, 2.0])[: len(names)]
    save_classifier(model, tmp_path / "hf", source, names, copied_tokenizer(source.directory, 64))
    words = ["--input", "dev.jsonl", "--text", "one", "--text-pair", "two", "--out", tmp_path / "out.jsonl"]
    assert fusebert("predict", "--model", tmp_path / "hf", *words) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.model_max_length == 64
    rows = lines_of(Path("dev.jsonl"))
    inputs = tokenizer([row["one"] for row in rows], [row["two"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**inputs).logits
    found = lines_of(tmp_path / "out.jsonl")
    if problem == "regression":
        torch.testing.assert_close(torch.tensor([[each["value"]] for each in found]), logits, rtol=1e-4, atol=1e-5)
        return
    given = torch.tensor([[each["probabilities"][name] for name in names] for each in found])
    torch.testing.assert_close(given, logits.sigmoid(), rtol=1e-4, atol=1e-5)
    assert all(each["labels"] == [name for name in names if each["probabilities"][name] > 0.5] for each in found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "model", "--input", "dev.tsv"], "model has no classification head: fine-tune the model first"),
        (["--model", "topics/hf", "--input", "dev.tsv", "--n-best", "2"], "--n-best is for a model that answers"),
        (["--model", "topics", "--input", "dev.tsv"], "topics is a run's folder: give the model in it"),
        (["--model", "topics/hf", "--input", "dev.jsonl"], "dev.jsonl:1: no field 'text'"),
    ],
)
def test_mistakes_in_a_prediction(words, expected: str, topics: Path, fusebert: Fusebert, capsys) -> None:
    assert fusebert("predict", *words) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
