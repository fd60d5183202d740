"""A folder with a corpus, an untrained tiny model of its vocabulary, and files of texts."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import ANIMALS, FOODS, PLACES
from untrained import untrained_model

from fusebert.train import cli

TEXTS = [
    f"The {animal} lives in the {place} and eats {food}."
    for animal, place, food in zip(ANIMALS, PLACES, FOODS, strict=True)
]


def write_labelled(folder: Path, name: str, count: int, seed: int) -> None:
    """``name``.tsv (text, label: the animal) and ``name``.jsonl (one, two, topics, score)."""
    rng = random.Random(seed)
    table, lines = ["text\tlabel"], []
    for _ in range(count):
        animal, place = rng.choice(ANIMALS[:3]), rng.choice(PLACES)
        food = rng.sample(FOODS[:2], rng.randrange(3))
        table.append(f"The {animal} lives in the {place}{' and eats ' * rng.randrange(3)}.\t{animal}")
        record = {"one": f"The {animal} eats", "two": " and ".join(food), "topics": ";".join(food), "score": len(food)}
        lines.append(json.dumps(record))
    (folder / f"{name}.tsv").write_text("\n".join(table) + "\n")
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_pairs(folder: Path, name: str, count: int, seed: int) -> None:
    """``name``.tsv: anchor, positive (the place, and what this animal eats), negative (what another one
    eats; often empty). ``name``.jsonl: text, text_pair, score (5 or 0)."""
    rng = random.Random(seed)
    table, lines = ["anchor\tpositive\tnegative"], []
    for _ in range(count):
        animal, other = rng.sample(ANIMALS, 2)
        where = rng.choice(PLACES)
        anchor = f"The {animal} lives in the {where}"
        positive, negative = (f"From the {where} it took {FOODS[ANIMALS.index(each)]}" for each in (animal, other))
        table.append(f"{anchor}\t{positive}\t{negative if rng.random() < 0.5 else ''}")
        same = rng.random() < 0.5
        record = {"text": anchor, "text_pair": positive if same else negative, "score": 5 if same else 0}
        lines.append(json.dumps(record))
    (folder / f"{name}.tsv").write_text("\n".join(table) + "\n")
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_tagged(folder: Path, name: str, count: int, seed: int) -> None:
    """``name``.conll: animals and places are entities, of one or two words."""
    rng = random.Random(seed)
    lines = ["-DOCSTART- -X- O", ""]
    for _ in range(count):
        animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
        young = rng.random() < 0.5
        words = ["The", *["young"] * young, animal, "lives", "in", "the", place, "."]
        tags = ["O", *["B-ANIMAL"] * young, "I-ANIMAL" if young else "B-ANIMAL", "O", "O", "O", "B-PLACE", "O"]
        lines += [*(f"{word} X {tag}" for word, tag in zip(words, tags, strict=True)), ""]
    (folder / f"{name}.conll").write_text("\n".join(lines))


def write_questions(folder: Path, name: str, count: int, seed: int) -> None:
    """``name``.json in the form of SQuAD 2.0: which animal, place or food is in a context; half have no food."""
    rng = random.Random(seed)
    paragraphs = []
    for i in range(count):
        named = {"animal": rng.choice(ANIMALS), "place": rng.choice(PLACES)}
        context = f"The {named['animal']} lives in the {named['place']}."
        if rng.random() < 0.5:
            named["food"] = rng.choice(FOODS)
            context += f" It eats {named['food']}."
        asked = rng.choice(["animal", "place", "food", "food"])
        answers = [{"text": named[asked], "answer_start": context.index(named[asked])}] if asked in named else []
        question = {"id": f"q{i}", "question": f"{asked}?", "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": context, "qas": [question]})
    content = {"version": "v2.0", "data": [{"title": name, "paragraphs": paragraphs}]}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/, model/, texts as texts.txt, .tsv, .csv, .jsonl, .parquet; train and dev as the functions above write."""
    import pyarrow
    import pyarrow.parquet

    place = tmp_path_factory.mktemp("tasks")
    untrained_model(place)
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (place / "texts.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in [("id", "said"), *enumerate(TEXTS)]))
    (place / "texts.csv").write_text("text,n\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(TEXTS)))
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), place / "texts.parquet")
    for name, count, seed in (("train", 120, 0), ("dev", 40, 1)):
        write_labelled(place, name, count, seed)
        write_pairs(place, f"pairs-{name}", 2 * count, seed)
        write_tagged(place, name, count, seed)
        write_questions(place, name, 4 * count, seed)
    return place


@pytest.fixture
def fusebert(monkeypatch: pytest.MonkeyPatch, place: Path) -> Callable[..., int]:
    """Runs ``fusebert WORDS`` in ``place`` and returns its exit status."""
    monkeypatch.chdir(place)

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fusebert", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call
