"""Sentences and tags from every kind of file; bad rows are named."""

import json
from pathlib import Path

import pytest

from fusebert.train.errors import UserError
from fusebert.train.tasks.tag.sentences import TagColumns, read_sentences, read_words
from fusebert.train.tasks.tag.tags import TagSet, entities, entity_scores, entity_table

CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n"


def read(path: Path, content: str, columns: TagColumns | None = None):
    path.write_text(content)
    return [(each.words, each.tags) for each in read_sentences(str(path), columns or TagColumns())]


def test_columns(tmp_path: Path) -> None:
    expected = [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])]
    assert read(tmp_path / "a.conll", CONLL) == expected
    assert read(tmp_path / "a.txt", "\ufeff" + CONLL.rstrip().replace("\n", "\r\n")) == expected
    assert read(tmp_path / "a.tsv", CONLL.replace("EU ", "E U\t").replace(" ", "\t").replace("E\tU", "E U")) == [
        (["E U", "rejects"], ["B-ORG", "O"]),
        expected[1],
    ]
    assert read(tmp_path / "a.conll", CONLL, TagColumns("2", "1"))[1] == (["NNP"], ["Peter"])
    assert read(tmp_path / "a.conll", CONLL, TagColumns(tagged=False))[1] == (["Peter"], None)
    assert read(tmp_path / "a.conll", "a\u00a0b O\n") == [(["a\u00a0b"], ["O"])]


def test_records(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, {"tokens": [], "tags": []}]
    expected = [(row["tokens"], row["tags"]) for row in rows]
    assert read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    sentences = list(read_sentences(str(tmp_path / "a.parquet"), TagColumns()))
    assert [(each.words, each.tags) for each in sentences] == expected
    assert sentences[0].where_is(1).endswith("a.parquet, row 1, word 2")


def test_texts_are_split_into_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ada's cat, in Köln.\n\n")
    words = [["Ada", "'", "s", "cat", ",", "in", "Köln", "."], []]
    assert [each.words for each in read_words(str(tmp_path / "a.txt"), None)] == words
    (tmp_path / "a.jsonl").write_text('{"said": "a b"}\n{"said": ["c d"]}\n')
    assert [each.words for each in read_words(str(tmp_path / "a.jsonl"), "said")] == [["a", "b"], ["c d"]]
    (tmp_path / "a.conll").write_text("EU\nrejects\n\nPeter\n")
    assert [each.words for each in read_words(str(tmp_path / "a.conll"), None)] == [["EU", "rejects"], ["Peter"]]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.conll", "a O\nb\n", TagColumns(), r"a\.conll:2: 1 columns, but the first row has 2"),
        ("a.conll", "\na\n", TagColumns(), r"a\.conll:2: column 1 cannot be both word and tag"),
        (
            "a.conll",
            "a O\n",
            TagColumns(tags="3"),
            r"a\.conll:1: --label '3' is not the number of one of the 2",
        ),
        ("a.conll", "a O\n", TagColumns("words"), r"a\.conll:1: --text 'words' is not the number"),
        ("a.tsv", "a\tO\n\tO\n", TagColumns(), r"a\.tsv:2: the word is empty"),
        ("a.tsv", "a\t\n", TagColumns(), r"a\.tsv:1: the tag is empty"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [0]}\n', TagColumns(), r"a\.jsonl:1: the tags are numbers: write their"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}\n', TagColumns(), r"a\.jsonl:1: 1 words, but 2 tags"),
        (
            "a.jsonl",
            '{"tokens": "a", "tags": ["O"]}\n',
            TagColumns(),
            r"a\.jsonl:1: the words are not a list",
        ),
        ("a.jsonl", '{"tokens": ["a"]}\n', TagColumns(), r"a\.jsonl:1: no field 'tags'.*--label"),
        ("a.xml", "", TagColumns(), r"a\.xml is of an unknown kind: its name must end in \.conll"),
    ],
)
def test_bad_rows_are_named(name: str, content: str, columns: TagColumns, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, content, columns)


def test_a_tag_that_was_not_trained_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a O\nb B-X\n\nc O\nd B-Y\n")
    sentences = list(read_sentences(str(tmp_path / "a.conll"), TagColumns()))
    tags = TagSet.of(sentences[:1])
    assert tags.names == ("B-X", "O")
    assert tags.numbers(sentences[0]).tolist() == [1, 0]
    with pytest.raises(UserError, match=r"a\.conll:5: the tag 'B-Y' is not in the training files, .* B-X, O"):
        tags.numbers(sentences[1])
    assert TagSet.of(sentences, known=["O", "B-Y", "B-X", "I-X"]).names == ("O", "B-Y", "B-X", "I-X")
    with pytest.raises(UserError, match="no two tags to tell apart, only O"):
        TagSet.of([sentences[0].__class__("", ["a"], ["O"])])


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-P I-P O B-L", [("P", 1, 3), ("L", 4, 5)]),
        ("I-P I-P B-P I-L O", [("P", 0, 2), ("P", 2, 3), ("L", 3, 4)]),  # IOB1
        ("S-P B-L I-L E-L O", [("P", 0, 1), ("L", 1, 4)]),  # BIOES
        ("U-P B-L I-L L-L U-P", [("P", 0, 1), ("L", 1, 4), ("P", 4, 5)]),  # BILOU
        ("O O", []),
    ],
)
def test_spans(tags: str, spans: list) -> None:
    found = entities(tags.split())
    assert [(each["type"], each["start"], each["end"]) for each in found] == spans
    assert TagSet(tuple(tags.split())).are_spans


def test_scores_count_entities_not_words() -> None:
    truth = [["B-P", "I-P", "O"], ["B-L", "O", "U-P"]]
    found = [["B-P", "O", "O"], ["B-L", "B-L", "U-P"]]  # 2 of 4 found ones are right, of 3
    scores = entity_scores(truth, found)
    assert scores == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 4 / 6})
    table = {each["class"]: each for each in entity_table(truth, found)}
    assert table["P"] == {"class": "P", "precision": 0.5, "recall": 0.5, "f1": 0.5, "entities": 2.0}
    assert table["L"]["precision"] == 0.5
    assert entity_table([["O"]], [["O"]]) == []
    assert not TagSet(("NOUN", "O")).are_spans
