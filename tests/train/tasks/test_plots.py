"""The embedding maps of a report: principal axes, colours, and every kind of predictions."""

import numpy as np
import pytest
import torch

from fusebert.model.heads import PROBLEMS
from fusebert.train.tasks.class_report import LabelPredictions
from fusebert.train.tasks.contrast_scores import PairPredictions
from fusebert.train.tasks.labels import Labels
from fusebert.train.tasks.pairs import Pairs
from fusebert.train.tasks.plots import plane
from fusebert.train.tasks.rows import Row

figure = pytest.importorskip("matplotlib.figure")


def drawn(predictions):
    """The axes of each plot."""
    found = []
    for plot in predictions.plots():
        found.append(figure.Figure().add_subplot())
        plot(found[-1])
        found[-1].figure.canvas.draw()
    return found


def test_a_plane_of_vectors_keeps_their_distances():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(30, 2))
    vectors = (flat @ np.linalg.qr(rng.normal(size=(7, 7)))[0][:2]).astype(np.float32)
    points, words = plane(vectors)
    distances = [np.linalg.norm(each[:, None] - each[None], axis=-1) for each in (flat, points)]
    np.testing.assert_allclose(*distances, atol=1e-5)
    assert words == "two principal axes, 100% of the variance"
    assert plane(vectors[:1])[0].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_labelled_texts(problem):
    rng = np.random.default_rng(0)
    names = tuple("abcdefghijkl") if problem != "regression" else ("LABEL_0",)
    truth = {
        "single_label_classification": torch.arange(40) % 12,
        "multi_label_classification": torch.from_numpy((rng.random((40, 12)) < 0.2).astype(np.float32)),
        "regression": torch.rand(40),
    }[problem]
    logits, vectors = (rng.normal(size=(n, k)).astype(np.float32) for n, k in ((40, len(names)), (30, 5)))
    rows = [Row("", "text") for _ in range(40)]
    *_, last = drawn(LabelPredictions(Labels(problem, names), rows, truth, logits, vectors))
    assert last.get_title(loc="left") == "Embedding map"
    points = np.concatenate([each.get_offsets() for each in last.collections])
    assert len(points) == 30
    if problem == "single_label_classification":
        labels = [text.get_text() for text in last.get_legend().get_texts()]
        assert labels == [*"abcdefghij", "others"]
    assert len(drawn(LabelPredictions(Labels(problem, names), rows, truth, logits))) == 2


@pytest.mark.parametrize("scored", [False, True])
def test_pairs_of_texts(scored):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    parts = rng.integers(0, 700, (600, 2))
    pairs = Pairs([], parts, rng.random(600).astype(np.float32) if scored else None)
    predictions = PairPredictions([Row("", "a", "b")] * 600, pairs, vectors, 16, 0.05)
    *_, last = drawn(predictions)
    lines = last.collections[0]
    assert len(lines.get_segments()) == 500
    expected = pairs.scores if scored else predictions.cosines()
    np.testing.assert_allclose(lines.get_array(), expected[:500])
