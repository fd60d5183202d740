"""`prepare` says what it made, warns of a text that its vocabulary loses, and refuses a corpus that is mostly [UNK]."""

import collections
import itertools
import json
import os
import random
import shlex
import statistics

import pytest
from languages import LANGUAGES
from small_corpus import write_text
from typer.testing import CliRunner

from fusebert.train.cli import app
from fusebert.train.corpus.format import manifest_sha256
from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:the text repeats too little"),
    pytest.mark.filterwarnings("ignore:only .* are held out"),
]

LETTERS = "abcdefghijklmnopqrstuvwxyz.,0123456789"
THAI = [sentence for language in LANGUAGES if language.name == "Thai" for sentence in language.sentences]


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A corpus of English text, a fifth of it copies, and what --json printed."""
    place = tmp_path_factory.mktemp("report")
    text = write_text(place / "text.txt", documents=320)
    documents = text.read_text().split("\n\n")
    text.write_text("\n\n".join(documents + documents[:80]))
    out = place / "my corpus"
    result = run("prepare", text, "--out", out, "--vocab-size", 240, "--heldout", 0.1, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_the_report_is_what_the_corpus_holds(english):
    out, printed = english
    corpus = Corpus.open(out)
    report = corpus.manifest["report"]
    assert {name: printed[name] for name in report} == report
    for name in ("train", "heldout"):
        split, told = corpus.split(name), report["splits"][name]
        counts = (split.num_documents, split.num_sentences, split.num_tokens)
        assert (told["documents"], told["sentences"], told["tokens"]) == counts
        (shard,) = split.shards
        bounds = shard.sentences[shard.documents]
        texts = [tuple(shard.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
        assert told["median_document_tokens"] == statistics.median(map(len, texts))
        assert told["mean_document_tokens"] == pytest.approx(split.num_tokens / len(texts), abs=0.05)
        assert told["unknown_share"] == (shard.tokens == corpus.special.unk).mean() == 0
        assert told["duplicate_documents"] == len(texts) - len(set(texts))
        assert told["duplicate_share"] == told["duplicate_documents"] / len(texts)
        assert len(told["sample_lines"]) == 3
        assert all(word in " ".join(told["sample_lines"][0]) for word in ("years ago",))
    assert sum(report["splits"][name]["duplicate_documents"] for name in report["splits"]) == 80
    assert list(report["scripts"]) == ["LATIN"]
    assert report["heldout_share"] == pytest.approx(0.1, rel=0.1)
    assert report["warnings"] == []
    assert printed["source"]["lowercase"] is True


def test_the_next_command_runs(english, tmp_path, monkeypatch):
    out, printed = english
    assert f"--data '{out}'" in printed["next"]
    monkeypatch.chdir(tmp_path)
    words = shlex.split(printed["next"])
    assert words[0] == "fusebert"
    words = words[1 : words.index("--minutes")]  # a step in place of the five minutes
    small = ["--steps", "1", "--seqlen", "32", "--tokens-per-batch", "256", "--device", "cpu", "--threads", "1"]
    result = run(*words, *small)
    assert result.exit_code == 0, result.output
    assert os.listdir("runs") == ["my corpus"]


def test_the_table(tmp_path):
    text = write_text(tmp_path / "text.txt", documents=60)
    result = run("prepare", text, "--out", tmp_path / "out", "--vocab-size", 60, "--heldout", 0.3)
    assert result.exit_code == 0, result.output
    (told, _) = report = Corpus.open(tmp_path / "out").manifest["report"]["splits"].values()
    assert told["unknown_share"] > 0.01
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for words, name, pattern in (
        ("documents", "documents", "{:,}"),
        ("tokens a document, median", "median_document_tokens", "{:,.1f}"),
        ("share of [UNK]", "unknown_share", "{:.3%}"),
        ("share of duplicate documents", "duplicate_share", "{:.2%}"),
    ):
        assert f"{words} {' '.join(pattern.format(split[name]) for split in report)}" in lines
    first, count = next(iter(told["characters_without_token"].items()))
    assert any(line.startswith(f"characters without a token, train: {first} {count}") for line in lines)
    assert f"train: {' '.join(told['sample_lines'][0])}" in lines
    assert any("scripts: Latin 100.0%; case folded; accents stripped; sentences by blingfire" in line for line in lines)


def save_vocabulary(place, letters):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (place / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return place / "vocab.txt"


def test_the_characters_without_a_token_are_counted(tmp_path):
    texts = [f"the cat {'ж' * (i % 3)} sat {'щ' if i % 2 else 'ы'} here {i}" for i in range(199)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    vocabulary = save_vocabulary(tmp_path, LETTERS)
    settings = PrepareSettings(tmp_path / "out", [str(tmp_path / "a.txt")], tokenizer=vocabulary, workers=1)
    with pytest.warns(UserWarning, match=r"tokens are \[UNK\]: .* without a token \(ж ы щ\) in the vocabulary"):
        report = prepare(settings).manifest["report"]["splits"]
    found = collections.Counter()
    for split in report.values():
        found.update(split["characters_without_token"])
    assert found == {letter: "".join(texts).count(letter) for letter in "жщы"}


@pytest.mark.parametrize(
    ("texts", "options", "cause"),
    [
        (["THE CAT SAT"] * 2, {"letters": LETTERS, "lowercase": False}, "most of them capitals; --lowercase"),
        (["é ô ü cat"], {"letters": LETTERS, "accents": "keep"}, "most of them accented; --accents strip"),
        (["x" * 300], {"letters": LETTERS}, "words of over 100 characters.*leave out --tokenizer"),
        (THAI, {"letters": LETTERS}, "in the vocabulary of --tokenizer; leave that option out to learn one"),
        (["".join(map(chr, range(0x4E00, 0x4E80)))], {"vocab_size": 60}, "has no room; raise --vocab-size"),
    ],
    ids=["capitals", "accents", "long words", "another script", "no room"],
)
def test_above_one_percent_the_cause_and_the_option_are_named(tmp_path, texts, options, cause):
    letters = options.get("letters")
    options = {name: value for name, value in options.items() if name != "letters"}
    if letters is not None:
        options["tokenizer"] = save_vocabulary(tmp_path, letters)
    documents = [f"{text} number {i} of the text, and it goes on." for i in range(40) for text in texts]
    (tmp_path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    settings = PrepareSettings(
        tmp_path / "out", [str(tmp_path / "a.txt")], workers=1, allow_unknown=True, heldout=0.3, **options
    )
    with pytest.warns(UserWarning, match=rf"% of the tokens are \[UNK\]: .*{cause}") as caught:
        made = prepare(settings)
    assert made.manifest["report"]["warnings"][0] in [str(warning.message) for warning in caught]


def test_a_corpus_of_unknown_tokens_is_refused(tmp_path):
    random.seed(0)
    thai = ["".join(random.choices(THAI, k=3)) for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(thai), encoding="utf-8")
    options = {"tokenizer": save_vocabulary(tmp_path, LETTERS), "heldout": 0.3}
    given = [str(tmp_path / "a.txt")]
    with pytest.raises(UserError, match=r"\[UNK\]: .*leave that option out.*--allow-unknown") as raised:
        prepare(PrepareSettings(tmp_path / "out", given, **options))
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "vocab.txt"]
    with pytest.warns(UserWarning, match="leave that option out"):
        made = prepare(PrepareSettings(tmp_path / "out", given, allow_unknown=True, **options))
    assert made.manifest["report"]["splits"]["train"]["unknown_share"] > 0.5


def test_a_corpus_without_a_report_is_read(english, tmp_path):
    out, _ = english
    for path in out.iterdir():
        os.link(path, tmp_path / path.name)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["report"]
    manifest["sha256"] = manifest_sha256(manifest)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Corpus.open(tmp_path, verify=True).split("train").num_documents > 300
