"""`finetune --task qa` learns, continues to the bit, exports what Transformers loads, and predicts as in training."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lines_of
from stopped_runs import StopAfter

from fusebert.model.hf.encoders import open_encoder
from fusebert.train.errors import UserError
from fusebert.train.run.signals import Interrupted, StopSignal
from fusebert.train.tasks.finetune import finetune
from fusebert.train.tasks.models import choose_machine
from fusebert.train.tasks.qa.answers import best_answers, best_threshold, exact_and_f1
from fusebert.train.tasks.qa.questions import Question, read_questions
from fusebert.train.tasks.qa.task import read_answer_task
from fusebert.train.tasks.qa.windows import QuestionTokenizer
from fusebert.train.tasks.settings import FinetuneSettings

Fusebert = Callable[..., int]


def settings_of(place: Path, out: str) -> FinetuneSettings:
    return FinetuneSettings(
        model=place / "model",
        task="qa",
        train=[str(place / "train.json")],
        dev=str(place / "dev.json"),
        out=place / out,
        lr=2e-3,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    settings = settings_of(place, "answers")
    finetune(settings, StopSignal(), "")
    return settings.out


def test_it_learns_and_reports(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    scores = {name: each["mean"] for name, each in report["scores"].items()}
    assert min(scores["f1"], scores["has_answer_f1"], scores["no_answer_f1"]) > 0.8
    share = np.mean([bool(each.answers) for each in read_questions(str(run.parent / "dev.json"), answered=True)])
    assert 0.6 < share < 0.9
    assert scores["f1"] == pytest.approx(share * scores["has_answer_f1"] + (1 - share) * scores["no_answer_f1"])
    assert "Right, least sure first" in (run / "report.html").read_text()
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_are_those_of_training_and_transformers(run: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    out = tmp_path / "answers.jsonl"
    assert fusebert("predict", "--model", run / "hf", "--input", "dev.json", "--out", out) == 0
    found, questions = lines_of(out), list(read_questions("dev.json", answered=True))
    assert [each["id"] for each in found] == [each.id for each in questions]
    exact, f1 = np.mean([exact_and_f1(a["answer"], b) for a, b in zip(found, questions, strict=True)], axis=0)
    scores = json.loads((run / "report.json").read_text())["seeds"][0]["scores"]
    assert (exact, f1) == pytest.approx((scores["exact_match"], scores["f1"]))
    model, tokenizer = (each.from_pretrained(run / "hf") for each in (AutoModelForQuestionAnswering, AutoTokenizer))
    assert model.config.null_threshold == pytest.approx(scores["null_threshold"])
    for each, question in list(zip(found, questions, strict=True))[:10]:
        with torch.no_grad():
            theirs = model(**tokenizer(question.question, question.context, return_tensors="pt"))
        null = float(theirs.start_logits[0, 0] + theirs.end_logits[0, 0])
        assert each["null_score"] == pytest.approx(null, abs=1e-4)
        if each["answer"]:
            assert question.context[each["start"] : each["end"]] == each["answer"]


def test_jsonl_and_long_contexts(run: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    row = {"question": "owl?", "context": "The fox is in the tower. " * 30}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "context": ""}) + "\n")
    out = tmp_path / "out.jsonl"
    words = ["--seqlen", "24", "--stride", "8", "--out", out]
    assert fusebert("predict", "--model", run / "hf", "--input", tmp_path / "a.jsonl", *words) == 0
    first, empty = lines_of(out)
    assert (first["id"], empty["id"]) == ("1", "2")
    assert (empty["answer"], empty["start"], empty["score"]) == ("", None, None)


def test_n_best_and_how_texts_were_read_in_training(run: Path, place: Path, fusebert: Fusebert, tmp_path: Path) -> None:
    """A folder that names stride and longest answer gives what the options give."""
    shutil.copytree(run / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_answer_tokens"] == 30
    assert "stride" not in config
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "max_answer_tokens": 1, "stride": 3}))
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 20}))
    row = {"question": "owl?", "context": "The fox is in the tower. " * 6}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "context": ""}) + "\n")
    given = ["--input", tmp_path / "a.jsonl", "--n-best", "4"]
    options = ["--max-answer-tokens", "1", "--stride", "3", "--seqlen", "20"]
    assert fusebert("predict", "--model", run / "hf", *given, *options, "--out", tmp_path / "one.jsonl") == 0
    assert fusebert("predict", "--model", tmp_path / "hf", *given, "--out", tmp_path / "two.jsonl") == 0
    assert fusebert("predict", "--model", run / "hf", *given, "--out", tmp_path / "three.jsonl") == 0
    one, two, three = (lines_of(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    first, empty = one
    best = first["n_best"]
    assert len(best) == 4
    assert (best[0]["score"], best[0]["answer"]) == (first["score"], row["context"][best[0]["start"] : best[0]["end"]])
    assert all(a["probability"] >= b["probability"] for a, b in itertools.pairwise(best))
    assert sum(each["probability"] for each in best) + first["null_probability"] < 1.0 + 1e-9
    assert (empty["n_best"], empty["null_probability"]) == ([], 1.0)
    assert fusebert("predict", "--model", run / "hf", "--input", tmp_path / "a.jsonl", "--n-best", "21") == 2


def test_only_the_dev_texts_choose_the_threshold(run: Path, place: Path) -> None:
    settings = settings_of(place, "chosen")
    machine, folder = choose_machine(settings), open_encoder(run / "hf")
    task = read_answer_task(settings, machine, folder)
    model, _ = task.make_model(folder, trained=True)
    saved = model.null_threshold
    chosen = task.choose_threshold(model)
    assert model.null_threshold == pytest.approx(saved)
    model.null_threshold = 1e6
    assert task.predict(model, "dev").scores()["f1"] < chosen.scores()["f1"]
    assert model.null_threshold == 1e6


@pytest.mark.parametrize("steps", [4, 60])  # of 60 in an epoch
def test_a_continued_run_has_the_same_bits(run: Path, place: Path, steps: int) -> None:
    settings = dataclasses.replace(settings_of(place, f"answers-stopped-{steps}"), resume=True)
    with pytest.raises(Interrupted):
        finetune(settings, StopAfter(steps), "")
    finetune(settings, StopSignal(), "")
    for name in ("hf/model.safetensors", "hf/config.json"):
        assert (settings.out / name).read_bytes() == (run / name).read_bytes()


def question(context: str, answer: str, start: int) -> Question:
    return Question("", "1", "owl?", context, ((answer, start),))


def test_an_answer_has_a_label_in_the_windows_that_hold_all_of_it(place: Path) -> None:
    context = "The fox is in the tower. " * 8 + "Ünïcode: the owl is in the forest"
    asked = question(context, "the forest", context.index("the forest"))
    windows = QuestionTokenizer(open_encoder(place / "model"), 24, 8)([asked])
    assert len(windows) > 3
    covered = sorted({i for window in windows for start, end in window.offsets for i in range(start, end)})
    assert "".join(context[i] for i in covered) == context.replace(" ", "")
    held = 0
    for window in windows:
        assert len(window.text) <= 24
        first, last = window.label(asked)
        whole = window.offsets[0, 0] <= asked.answers[0][1] and window.offsets[-1, 1] >= len(context)
        assert (first, last) != (0, 0) or not whole
        if whole:
            held += 1
            start, end = window.offsets[first - window.first, 0], window.offsets[last - window.first, 1]
            assert context[start:end] == "the forest"
    assert held
    with pytest.raises(UserError, match=r"the question has .* tokens, which leaves 0 of a window"):
        QuestionTokenizer(open_encoder(place / "model"), 24)([dataclasses.replace(asked, question="owl " * 50)])


def squad(path: Path, **changes: object) -> Path:
    entry = {"id": "7", "question": "owl?", "answers": [{"text": "owl", "answer_start": 4}], **changes}
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "The owl is here", "qas": [entry]}]}]}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answers": [{"text": "owl", "answer_start": 5}]},
            r"a\.json, question 7: the answer 'owl' is not in the context",
        ),
        ({"answers": [{"text": "owl", "answer_start": -4}]}, "is not in the context at answer_start -4"),
        ({"answers": [{"text": "owl"}]}, "is not in the context at answer_start None"),
        ({"answers": "owl"}, "question 7: no list 'answers'"),
        ({"question": 3}, "question 7: 'question' is not a string"),
        ({"id": ""}, "a question has no id"),
    ],
)
def test_bad_questions_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(read_questions(str(squad(tmp_path / "a.json", **changes)), answered=True))


def test_white_space_around_an_answer_is_left_out(tmp_path: Path) -> None:
    path = squad(tmp_path / "a.json", answers=[{"text": " owl ", "answer_start": 3}])
    (found,) = read_questions(str(path), answered=True)
    assert found.answers == (("owl", 4),)
    path = squad(tmp_path / "a.json", is_impossible=True)
    assert next(read_questions(str(path), answered=True)).answers == ()


def test_the_best_span_is_in_order_and_not_too_long(place: Path) -> None:
    asked = question("fox owl tower forest", "owl", 4)
    windows = QuestionTokenizer(open_encoder(place / "model"))([asked])
    (window,) = windows
    logits = np.zeros((len(window.text), 2), dtype=np.float32)
    starts, ends = logits[window.first :, 0], logits[window.first :, 1]
    starts[0], starts[2], ends[1], ends[3], logits[0] = 5.0, 6.0, 4.0, 2.5, 1.0
    assert best_answers([asked], windows, [logits], 30)[0].text == "fox owl"  # 9.0; tower before owl has 10
    (best,) = best_answers([asked], windows, [logits], 1)
    assert (best.text, best.spans[0].score, best.null_score) == ("tower", 6.0, 2.0)


def test_the_n_best_are_all_spans_sorted_with_each_text_once(place: Path) -> None:
    """Against a list of every span, in windows that overlap and have a text twice."""
    asked = question("fox owl tower owl forest fox", "owl", 4)
    tokenizer = QuestionTokenizer(open_encoder(place / "model"), 9, 1)
    windows = tokenizer([asked])
    assert len(windows) > 1
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(len(window.text), 2)).astype(np.float32) for window in windows]
    every: dict[str, float] = {}
    for window, scores in zip(windows, logits, strict=True):
        for i, (start, _) in enumerate(window.offsets):
            for j, (_, end) in enumerate(window.offsets[i : i + 3], i):
                score = float(scores[window.first + i, 0] + scores[window.first + j, 1])
                text = asked.context[start:end]
                every[text] = max(score, every.get(text, -np.inf))
    expected = sorted(every.items(), key=lambda item: -item[1])[:5]
    (found,) = best_answers([asked], windows, logits, 3, count=20)
    assert [span.text for span in found.spans[:5]] == [text for text, _ in expected]
    assert [span.score for span in found.spans[:5]] == pytest.approx([score for _, score in expected])
    assert found.null_score == pytest.approx(min(float(scores[0].sum()) for scores in logits))
    scores = torch.tensor([*(span.score for span in found.spans), found.null_score])
    np.testing.assert_allclose(found.probabilities(with_null=True), scores.softmax(0), rtol=1e-5)
    assert found.probabilities(with_null=False)[-1] == 0.0


def test_windows_of_many_questions_are_those_of_each(place: Path) -> None:
    """Long questions leave less room, so that the default overlap differs."""
    asked = [question("The fox is in the tower. " * n, "fox", 4) for n in (1, 9, 3)]
    asked += [dataclasses.replace(each, question="owl " * n) for n, each in zip((2, 7, 12), asked, strict=True)]
    for overlap in (None, 5):
        tokenizer = QuestionTokenizer(open_encoder(place / "model"), 24, overlap)
        alone = [dataclasses.replace(each, number=i) for i, one in enumerate(asked) for each in tokenizer([one])]
        together = tokenizer(asked)
        assert len(together) > 2 * len(asked)
        for one, other in zip(alone, together, strict=True):
            assert (one.number, one.first) == (other.number, other.first)
            assert one.text.ids.tolist() == other.text.ids.tolist()
            assert one.offsets.tolist() == other.offsets.tolist()


def test_the_threshold_gives_the_highest_f1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        margins, with_answer, without = rng.integers(-3, 4, 15) + 0.25, rng.random(15), rng.random(15)

        def f1(threshold: float, margins=margins, one=with_answer, other=without) -> float:
            return np.where(margins > threshold, other, one).mean()

        best = max(f1(threshold) for threshold in np.arange(-5, 6))
        assert f1(best_threshold(margins, with_answer, without)) == pytest.approx(best)


def test_answers_are_compared_as_in_squad() -> None:
    asked = dataclasses.replace(question("", "the red owl", 0), answers=(("the red owl", 0), ("owl", 8)))
    assert exact_and_f1("Red owl!", asked) == (1.0, 1.0)
    assert exact_and_f1("red fox", asked) == pytest.approx((0.0, 0.5))
    none = dataclasses.replace(asked, answers=())
    assert exact_and_f1("", none) == (1.0, 1.0)
    assert exact_and_f1("owl", none) == (0.0, 0.0)
