"""``finetune --task embed``: cached gradients are the gradient, runs learn and continue to the bit, and
sentence-transformers loads what is exported."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score
from torch import nn
from torchmetrics.functional.retrieval import retrieval_recall

from fusebert.model.config import BertConfig
from fusebert.model.contrastive import Compared
from fusebert.model.heads import CachedGradientEncoder
from fusebert.train.run.signals import Interrupted, StopSignal
from fusebert.train.step.optim import make_optimizer
from fusebert.train.step.step import TrainingStep
from fusebert.train.tasks.contrast_scores import PairPredictions, rank_positives
from fusebert.train.tasks.contrast_step import Comparison, ContrastiveStep
from fusebert.train.tasks.embed import Embedder
from fusebert.train.tasks.finetune import finetune
from fusebert.train.tasks.pairs import PairBatches, Pairs
from fusebert.train.tasks.rows import Row
from fusebert.train.tasks.settings import FinetuneSettings, ModelSettings
from fusebert.train.tasks.tokens import EncodedText

Fusebert = Callable[..., int]


def random_pairs(rows: int, scored: bool = False, dtype: type = np.float32) -> Pairs:
    rng = np.random.default_rng(0)
    texts = [EncodedText(ids, np.zeros_like(ids)) for ids in (rng.integers(5, 60, n) for n in rng.integers(3, 20, 40))]
    parts = rng.integers(0, len(texts), (rows, 2 if scored else 3))
    if not scored:
        parts[1::3, 2] = -1
    return Pairs(texts, parts, rng.random(rows).astype(dtype) if scored else None)


def weight_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


class Kept(torch.optim.SGD):
    """Keeps the gradient that a step has."""

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        self.kept = [None if each.grad is None else each.grad.clone() for each in self.param_groups[0]["params"]]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("scored", [False, True])
def test_cached_gradients_are_the_gradient(pooling: str, scored: bool) -> None:
    """In float64 with dropout: of a loss over all micro-batches, with the graphs of all of them kept."""
    pairs = random_pairs(9, scored, np.float64)
    (window,) = PairBatches(pairs, 16, 60, seed=0).epoch(0)
    assert len(window) > 3
    torch.manual_seed(0)
    model = CachedGradientEncoder(BertConfig.preset("tiny", 64), pooling).double().train()
    seeds = list(range(7, 7 + len(window)))

    vectors = []
    for batch, seed in zip(window, seeds, strict=True):
        torch.manual_seed(seed)
        vectors.append(model.vectors(batch))
    together, places = torch.cat(vectors), torch.cat([batch.labels for batch in window]).numpy()
    found: Compared = Comparison(pairs, 0.05)(together.detach(), places)
    (together * found.gradient).sum().backward()
    # The gradient with respect to the vectors itself, by autograd through plain formulas.
    leaf = together.detach().requires_grad_()
    by_place = {(int(row), int(part)): leaf[i] for i, (row, part) in enumerate(places)}
    anchors = torch.stack([by_place[i, 0] for i in range(9)])
    positives = torch.stack([by_place[i, 1] for i in range(9)])
    if scored:
        plain = (nn.functional.cosine_similarity(anchors, positives) - torch.from_numpy(pairs.scores)).square().sum()
    else:
        others = sorted((part, row) for row, part in by_place if part > 0)
        numbers = [int(pairs.parts[row, part]) for part, row in others]
        cosines = (
            nn.functional.normalize(anchors)
            @ nn.functional.normalize(torch.stack([by_place[row, part] for part, row in others])).T
        )
        plain = torch.zeros((), dtype=torch.float64)
        for i in range(9):
            own = [int(pairs.parts[j, 1]) for j in range(9) if pairs.parts[j, 0] == pairs.parts[i, 0]]
            own.append(int(pairs.parts[i, 0]))
            logits = (
                torch.stack([cosines[i, i], *(cosines[i, k] for k, x in enumerate(numbers) if x not in own)]) / 0.05
            )
            plain = plain + logits.logsumexp(0) - logits[0]
    plain.backward()
    torch.testing.assert_close(found.loss_sum, plain.detach())
    torch.testing.assert_close(found.gradient, leaf.grad)

    expected = {name: grad / 9 for name, grad in weight_gradients(model).items()}
    model.zero_grad()
    optimizer = Kept(model.parameters(), lr=0.0)
    step = ContrastiveStep(
        TrainingStep(model, optimizer, clip=1e9, compute_dtype=torch.float32, losses=1), Comparison(pairs, 0.05)
    )
    result = step(window, 0.0, seeds=seeds)
    assert float(result.sums[0]) == pytest.approx(float(plain.detach()))
    for (name, _), grad in zip(model.named_parameters(), optimizer.kept, strict=True):
        if name in expected:
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)
    assert result.grad_norm > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_micro_batch_and_many_give_the_same_step(dtype: torch.dtype) -> None:
    pairs, results = random_pairs(12), []
    for tokens in (30, 10**6):
        torch.manual_seed(0)
        config = BertConfig.preset("tiny", 64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = CachedGradientEncoder(config)
        training = TrainingStep(
            model, make_optimizer(model, 1e-3, 0.0), clip=1.0, compute_dtype=torch.float32, losses=1
        )
        step, found = ContrastiveStep(training, Comparison(pairs, 0.05)), []
        for window in PairBatches(pairs, 6, tokens, seed=0).epoch(0):
            assert (len(window) == 1) == (tokens > 30)
            found += step(window, 1e-3, seeds=range(len(window))).sums.tolist()
        results.append(found)
    assert results[0] == pytest.approx(results[1], rel=1e-4 if dtype == torch.float32 else 1e-3)


def test_an_epoch_has_each_row_once_in_steps_of_one_size() -> None:
    pairs = random_pairs(31)
    batches = PairBatches(pairs, 10, 50, seed=3)
    windows = list(batches.epoch(0))
    assert [sum(batch.num_labels for batch in window) for window in windows] == [8, 8, 8, 7]
    rows = [row for window in windows for batch in window for row, part in batch.labels.tolist() if part == 0]
    assert sorted(rows) == list(range(31))
    again = [torch.cat([b.input_ids for b in window]).tolist() for window in batches.epoch(0, start=2)]
    assert again == [torch.cat([b.input_ids for b in window]).tolist() for window in windows[2:]]
    assert all(batch.num_tokens <= 50 for window in windows for batch in window)


def test_ranks_by_hand() -> None:
    """Texts on a circle: 0 and 1 are anchors at 0° and 90°; candidates 2 … 5 at 10°, 20°, 80° and 5°."""
    angles = torch.deg2rad(torch.tensor([0.0, 90.0, 10.0, 20.0, 80.0, 5.0]))
    units = torch.stack([angles.cos(), angles.sin()], 1)
    parts = np.array([[0, 2, 5], [1, 3, -1], [0, 3, -1]])
    # Row 0: 2 is behind 5 (3 is a positive of 0 too). Row 1: 3 is nearest. Row 2: 3 is behind 5 only (2 is a positive).
    found, nearest, similarities = rank_positives(units, parts)
    assert found.tolist() == [2, 1, 2]
    assert nearest.tolist() == [5, 2, 5]
    np.testing.assert_allclose(similarities[0, :2], np.cos(np.deg2rad([10, 5])), rtol=1e-6)
    assert (similarities[0, 2:] == -2.0).all()
    alone, none, _ = rank_positives(units, np.array([[0, 2]]))
    assert (alone.tolist(), none.tolist()) == ([1], [-1])
    same, _, _ = rank_positives(torch.ones(6, 1), parts)  # a tie is no success
    assert same.tolist() == [2, 3, 2]


@pytest.mark.parametrize("equal", [False, True])
def test_scores_are_the_libraries(equal: bool) -> None:
    """scikit-learn ranks all candidates of all rows at once; with ``equal`` texts, ties."""
    rng = np.random.default_rng(0)
    count = 60
    vectors = rng.normal(size=(2 * count, 3)).astype(np.float32)
    vectors[count:] += 2.0 * vectors[:count]
    if equal:
        vectors = np.sign(vectors)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    parts = np.stack([np.arange(count), np.arange(count, 2 * count)], 1)
    rows = [Row("", "", "") for _ in parts]
    found = PairPredictions(rows, Pairs([], parts, None), vectors, 16, 0.05).scores()
    similarity = torch.from_numpy(vectors[:count]) @ torch.from_numpy(vectors[count:]).T
    mrr = label_ranking_average_precision_score(np.eye(count, dtype=bool), similarity.numpy())
    assert found["mrr"] == pytest.approx(mrr)
    own = similarity.diagonal()[:, None]
    ranks = (similarity >= own).sum(1)  # a tie is no success
    for k in (1, 10):
        assert found[f"recall_at_{k}"] == pytest.approx(float((ranks <= k).float().mean()))
    if not equal:
        assert 0.1 < found["recall_at_1"] < found["recall_at_10"] < 1.0
        each = [
            [float(retrieval_recall(similarity[i], torch.arange(count) == i, top_k=k)) for i in range(count)]
            for k in (1, 10)
        ]
        assert (found["recall_at_1"], found["recall_at_10"]) == pytest.approx(tuple(np.mean(each, 1)))


@pytest.fixture(scope="module")
def pairs_run(place: Path) -> Path:
    settings = FinetuneSettings(
        model=place / "model",
        task="embed",
        train=[str(place / "pairs-train.tsv")],
        dev=str(place / "pairs-dev.tsv"),
        negative=["negative"],
        out=place / "pairs",
        lr=2e-3,
        batch_size=40,
        epochs=4,
        tokens_per_batch=256,
        seeds=2,
    )
    finetune(settings, StopSignal(), "")
    return settings.out


def test_it_learns_and_reports(pairs_run: Path) -> None:
    report = json.loads((pairs_run / "report.json").read_text())
    assert report["scores"]["mrr"]["mean"] > 1.3 * untrained_mrr(pairs_run.parent)
    assert report["scores"]["mrr"]["stdev"] >= 0.0
    records = [json.loads(line) for line in (pairs_run / "seed-0" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "finetune"]
    assert losses[-1] < losses[0]
    page = (pairs_run / "report.html").read_text()
    assert "Positives that are found last" in page
    assert "nearest negative" in page


def untrained_mrr(place: Path) -> float:
    rows = [line.split("\t") for line in (place / "pairs-dev.tsv").read_text().splitlines()[1:]]
    texts = list(dict.fromkeys(text for row in rows for text in row if text))
    number = {text: i for i, text in enumerate(texts)}
    vectors = torch.from_numpy(Embedder(ModelSettings(model=place / "model"), normalize=True)(texts))
    found, _, _ = rank_positives(vectors, np.array([[number.get(text, -1) for text in row] for row in rows]))
    return float((1 / found).mean())


def test_sentence_transformers_and_embed_read_the_model(pairs_run: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = ["The fox lives in the forest", "", "berries for the owl " * 40]
    theirs = library.SentenceTransformer(str(pairs_run / "hf"), device="cpu")
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Normalize"]
    assert theirs.max_seq_length == 512
    ours = Embedder(ModelSettings(model=pairs_run / "hf"))
    assert (ours.pooling, ours.normalize) == ("mean", True)
    np.testing.assert_allclose(ours(texts), theirs.encode(texts), atol=1e-5)
    untrained = Embedder(ModelSettings(model=pairs_run.parent / "model"))(texts)
    assert np.abs(ours(texts) - untrained).max() > 1e-2
    from transformers import AutoModel

    _, info = AutoModel.from_pretrained(pairs_run / "hf", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("steps", [2, 6])  # of 6 in an epoch
def test_a_continued_run_has_the_same_bits(pairs_run: Path, place: Path, steps: int) -> None:
    class StopAfter(StopSignal):
        left = steps

        @property
        def received(self) -> int | None:
            self.left -= 1
            return signal.SIGTERM if self.left < 0 else None

        @received.setter
        def received(self, value: int | None) -> None: ...

    settings = FinetuneSettings(
        model=place / "model",
        task="embed",
        train=[str(place / "pairs-train.tsv")],
        dev=str(place / "pairs-dev.tsv"),
        negative=["negative"],
        out=place / f"pairs-stopped-{steps}",
        lr=2e-3,
        batch_size=40,
        epochs=4,
        tokens_per_batch=256,
        resume=True,
    )
    with pytest.raises(Interrupted):
        finetune(settings, StopAfter(), "")
    finetune(settings, StopSignal(), "")
    one, other = (folder / "hf" / "model.safetensors" for folder in (settings.out, pairs_run / "seed-0"))
    assert one.read_bytes() == other.read_bytes()


def test_scored_pairs(place: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    words = ["--train", "pairs-train.jsonl", "--dev", "pairs-dev.jsonl", "--label", "score", "--score-range", "0:5"]
    words += ["--lr", "2e-3", "--batch-size", "20", "--epochs", "6", "--pooling", "max", "--no-normalize"]
    words += ["--test", "pairs-dev.jsonl"]
    assert fusebert("finetune", "--model", "model", "--task", "embed", "--out", tmp_path / "run", *words) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metric"] == "spearman"
    assert report["test"]["seeds"][0] == pytest.approx(report["seeds"][0]["scores"], abs=1e-5)
    ours = Embedder(ModelSettings(model=tmp_path / "run" / "hf"))
    assert (ours.pooling, ours.normalize) == ("max", False)
    rows = [json.loads(line) for line in (place / "pairs-dev.jsonl").read_text().splitlines()]
    one, other = (ours([row[name] for row in rows]) for name in ("text", "text_pair"))
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(one), torch.from_numpy(other)).numpy()
    error = np.square(cosine - [row["score"] / 5 for row in rows]).mean()
    assert report["seeds"][0]["scores"]["loss"] == pytest.approx(error, abs=1e-5)
    log = [json.loads(line) for line in (tmp_path / "run" / "seed-0" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if record["kind"] == "finetune"]
    assert losses[-1] < 0.6 * losses[0]


MISTAKES = {
    "no column": (["--train", "train.tsv"], "train.tsv:1: no column 'anchor' (the first row: 'text', 'label')"),
    "no negative": (["--negative", "other"], "pairs-train.tsv:1: no column 'other'"),
    "empty": (["--train", "gap.tsv"], "gap.tsv:3: the text pair is empty"),
    "cells": (["--train", "short.tsv"], "short.tsv:2: 1 cells, but the first row has 2"),
    "temperature": (["--temperature", "0"], "--temperature must be above 0"),
    "pooling": (["--pooling", "pooler"], "--pooling 'pooler' is not known here: choose one of auto, mean, cls, max"),
    "metric": (["--metric", "spearman"], "choose one of auto, mrr, recall_at_1, recall_at_10, loss"),
    "weights": (["--class-weights", "balanced"], "--class-weights is for --task classify"),
    "one positive": (["--train", "one.tsv"], "--train has only one positive text"),
    "range": (
        ["--score-range", "0:5"],
        "--score-range is for scored pairs: name the column of the scores with --label",
    ),
    "both": (["--label", "score", "--negative", "negative"], "--negative is for pairs without a score"),
    "outside": (
        ["--label", "score", "--train", "pairs-train.jsonl"],
        "the score 5 is not from 0 to 1: give the scores' range, such as --score-range 0:5",
    ),
    "bad range": (["--label", "score", "--score-range", "5:0"], "--score-range must be LOW:HIGH with LOW below HIGH"),
    "no number": (["--label", "score", "--train", "words.jsonl"], "words.jsonl:1: the score 'much' is not a number"),
    "another task": (["--task", "classify", "--negative", "negative"], "--negative is for --task embed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, place: Path, fusebert: Fusebert, capsys, tmp_path: Path) -> None:
    (place / "gap.tsv").write_text("anchor\tpositive\na\tb\nc\t \n")
    (place / "short.tsv").write_text("anchor\tpositive\na\n")
    (place / "one.tsv").write_text("anchor\tpositive\na\tb\nc\tb\n")
    (place / "words.jsonl").write_text(json.dumps({"text": "a", "text_pair": "b", "score": "much"}) + "\n")
    words, expected = MISTAKES[name]
    given = [
        "--model",
        "model",
        "--out",
        tmp_path / "run",
        "--dev",
        "pairs-dev.jsonl" if "--label" in words else "pairs-dev.tsv",
    ]
    given += [] if "--task" in words else ["--task", "embed"]
    given += [] if "--train" in words else ["--train", "pairs-train.tsv"]
    assert fusebert("finetune", *given, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert expected in line
