"""`prepare`: the corpus holds the text, does not depend on the workers, and is complete or absent."""

import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer
from typer.testing import CliRunner

from fusebert.train.cli import app
from fusebert.train.corpus import parts as parts_module
from fusebert.train.corpus import prepare as prepare_module
from fusebert.train.corpus import survey as survey_module
from fusebert.train.corpus.encode import encode_documents
from fusebert.train.corpus.format import CorpusError
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings, parse_size
from fusebert.train.corpus.survey import HELDOUT, Surveyor, document_digest
from fusebert.train.corpus.writer import CorpusWriter
from fusebert.train.errors import UserError
from fusebert.train.text import pydocs

SAYING = "the quick brown fox jumps over one lazy dog while seven small birds sing among old trees near cold water"
WORDS = SAYING.split()

pytestmark = [
    pytest.mark.filterwarnings("ignore:the text repeats too little"),
    pytest.mark.filterwarnings("ignore:only .* are held out"),
    pytest.mark.filterwarnings("ignore:.* of the text is held out"),
]


def prepare(inputs, out, **options):
    return prepare_module.prepare(PrepareSettings(out, inputs, **options))


def some_documents(count, seed=0):
    """Documents of 1 … 8 sentences of words that a small vocabulary learns whole."""
    rng = random.Random(seed)
    return [
        [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "." for _ in range(rng.randint(1, 8))]
        for _ in range(count)
    ]


def write_text(path, documents):
    path.write_text("\n\n".join(" ".join(sentences) for sentences in documents))
    return str(path)


def read_back(corpus, *names):
    """The documents of a corpus as sets of decoded sentences, spaces taken out."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    found = []
    for name in names:
        for shard in corpus.split(name).shards:
            for d in range(shard.num_documents):
                bounds = shard.sentences[shard.documents[d] : shard.documents[d + 1] + 1]
                ids = [shard.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
                found.append(tuple(text.replace(" ", "") for text in tokenizer.decode_batch(ids)))
    return found


def folded(documents):
    return [tuple(sentence.lower().replace(" ", "") for sentence in sentences) for sentences in documents]


def survey(texts, scratch, heldout, sample_chars):
    surveyor = Surveyor(scratch, 0, sample_chars)
    surveyor.add((text, False) for text in texts)
    return surveyor.finish(heldout)


def hashes(directory):
    """Of every file; of the manifest without the command to go on with, which names the folder, and its own hash."""
    content = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = json.loads(content["manifest.json"])
    del manifest["report"]["next"], manifest["sha256"]
    content["manifest.json"] = json.dumps(manifest).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def test_the_corpus_is_the_text(tmp_path):
    documents = some_documents(300)
    made = prepare([write_text(tmp_path / "a.txt", documents)], tmp_path / "out", vocab_size=100)
    assert sorted(read_back(made, "train", "heldout")) == sorted(folded(documents))
    # In order, so that neighbouring documents of the input are neighbours in the corpus.
    heldout = set(read_back(made, "heldout"))
    assert read_back(made, "train") == [d for d in folded(documents) if d not in heldout]
    assert made.manifest["report"]["heldout_share"] == pytest.approx(0.01, rel=0.1)
    assert 1.0 < made.unigram_entropy < 5.0
    assert made.vocab_size == 100
    assert made.manifest["source"]["inputs"] == [str(tmp_path / "a.txt")]
    Corpus.open(tmp_path / "out", verify=True)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]


def test_every_kind_of_input_is_the_same_corpus(tmp_path, monkeypatch):
    documents = some_documents(200)
    text = "\n\n".join(" ".join(d) for d in documents).encode()
    lines = b"".join(json.dumps({"body": " ".join(d)}).encode() + b"\n" for d in documents)
    files = {"a.txt": text, "b.txt.gz": gzip.compress(text), "c.txt.zst": zstandard.compress(text)}
    files |= {"d.jsonl": lines, "e.jsonl.gz": gzip.compress(lines), "f.jsonl.zst": zstandard.compress(lines)}
    files |= {"g": text, "h.json": b"[" + lines.strip().replace(b"\n", b",") + b"]", "i.txt.xz": lzma.compress(text)}
    made = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        made[name] = prepare([str(tmp_path / name)], tmp_path / f"out-{name}", vocab_size=100, text_field="body")
    for name, data, options in (("-", text, {}), ("JSON", lines, {}), ("told", lines, {"format": "json"})):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        made[name] = prepare(["-"], tmp_path / f"out-{name}", vocab_size=100, text_field="body", **options)
    expected = hashes(made["a.txt"].directory)
    for corpus in made.values():
        found = hashes(corpus.directory)
        assert {k: v for k, v in found.items() if k != "manifest.json"} == {
            k: v for k, v in expected.items() if k != "manifest.json"
        }


def test_workers_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "BATCH_CHARS", 2000)
    text = write_text(tmp_path / "a.txt", some_documents(400))
    prepare([text], tmp_path / "one", vocab_size=100, workers=1)
    prepare([text], tmp_path / "two", vocab_size=100, workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_workers_do_not_load_pytorch():
    script = "import sys, fusebert.train.corpus.encode; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_split_depends_on_the_text_alone(tmp_path):
    documents = some_documents(400)
    tokenizer = prepare([write_text(tmp_path / "a.txt", documents)], tmp_path / "a", vocab_size=100).tokenizer_path
    heldout = set(read_back(Corpus.open(tmp_path / "a"), "heldout"))
    doubled = documents + documents
    random.Random(0).shuffle(doubled)
    b = prepare([write_text(tmp_path / "b.txt", doubled)], tmp_path / "b", tokenizer=tokenizer)
    assert set(read_back(b, "heldout")) == heldout
    assert not heldout & set(read_back(b, "train"))
    assert b.tokenizer_path.read_bytes() == tokenizer.read_bytes()
    other = prepare([str(tmp_path / "a.txt")], tmp_path / "c", tokenizer=tokenizer, seed=1)
    assert set(read_back(other, "heldout")) != heldout


@pytest.mark.parametrize(
    ("count", "fraction", "least", "most"),
    [
        (2, 0.01, 1, 1),
        (2, 0.99, 1, 1),
        (30, 0.01, 1, 1),
        (200, 0.01, 2, 2),
        (1000, 0.3, 290, 310),
        (50, 0.999, 49, 49),
    ],
)
def test_how_much_is_held_out(tmp_path, count, fraction, least, most):
    documents = [[f"This is document number {i}."] for i in range(count)]
    made = prepare([write_text(tmp_path / "a.txt", documents)], tmp_path / "out", vocab_size=60, heldout=fraction)
    assert least <= made.split("heldout").num_documents <= most
    assert made.split("train").num_documents + made.split("heldout").num_documents == count


def test_the_sample_for_the_tokenizer_is_bounded_and_not_held_out(tmp_path):
    documents = [f"Document {i} " + "x" * (i % 7 * 40) for i in range(2000)]

    def sampled(texts):
        return survey(texts, tmp_path, 0.2, 20_000)

    whole = sampled(documents)
    by_rank = sorted(documents, key=lambda text: document_digest(text.encode(), 0)[8:][::-1])
    for order in (by_rank, by_rank[::-1], random.Random(0).sample(documents, len(documents))):
        assert sorted(sampled(order).sample) == sorted(whole.sample)
    assert 12_000 < sum(map(len, whole.sample)) <= 20_000
    heldout = {text for text, place in zip(documents, whole.places, strict=True) if place == HELDOUT}
    assert not heldout & set(whole.sample)
    assert 350 < len(heldout) < 450
    # Drawn from everywhere, not from the start.
    assert {int(text.split()[1]) // 500 for text in whole.sample} == {0, 1, 2, 3}


def test_special_tokens_in_the_text_are_text(tmp_path):
    documents = [[f"BERT writes [MASK] and [SEP] number {i}."] for i in range(50)]
    made = prepare([write_text(tmp_path / "a.txt", documents)], tmp_path / "out", vocab_size=100)
    for name in ("train", "heldout"):
        assert not set(made.split(name).shards[0].tokens.tolist()) & {0, 2, 3, 4}


def test_one_sentence_a_line(tmp_path):
    documents = [["one. two. four", "three", f"five {word}"] for word in WORDS]
    (tmp_path / "a.txt").write_text("\n\n".join("\n".join(lines) for lines in documents))
    made = prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=100, sentences="lines")
    assert {d[:2] for d in read_back(made, "train", "heldout")} == {("one.two.four", "three")}


def test_a_size_cap(tmp_path, monkeypatch):
    documents = some_documents(300)
    text = write_text(tmp_path / "a.txt", documents)
    made = prepare([text], tmp_path / "out", vocab_size=100, max_bytes=5000)
    found = folded(documents)[: made.split("train").num_documents + made.split("heldout").num_documents]
    assert sorted(read_back(made, "train", "heldout")) == sorted(found)
    assert 4000 < sum(len(" ".join(d)) for d in documents[: len(found)]) <= 5000

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            sentence = b"\xc3\xa9 never ends.\n\nIt goes on.\n\n"
            buffer[: len(sentence)] = sentence
            return len(sentence)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    made = prepare(["-"], tmp_path / "endless", vocab_size=30, max_bytes=20_000)
    assert made.split("train").num_tokens > 3000


def test_a_size_cap_of_records_on_standard_input(tmp_path, monkeypatch):
    documents = some_documents(300)
    lines = b"".join(json.dumps({"text": " ".join(d)}).encode() + b"\n" for d in documents)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    made = prepare(["-"], tmp_path / "out", vocab_size=100, max_bytes=5000)
    found = read_back(made, "train", "heldout")
    assert 20 < len(found) < 200
    assert sorted(found) == sorted(folded(documents)[: len(found)])


def test_copies_are_dropped_when_told(tmp_path):
    documents = some_documents(100)
    doubled = documents + documents[:50]
    options = {"vocab_size": 100, "heldout": 0.1}
    kept = prepare([write_text(tmp_path / "a.txt", doubled)], tmp_path / "a", **options)
    assert sum(split["duplicate_documents"] for split in kept.manifest["report"]["splits"].values()) == 50
    made = prepare([str(tmp_path / "a.txt")], tmp_path / "b", dedup=True, **options)
    once = prepare([write_text(tmp_path / "c.txt", documents)], tmp_path / "c", **options)
    for name in ("train", "heldout"):
        assert read_back(made, name) == read_back(once, name)
    report = made.manifest["report"]
    assert report["copies_left_out"] == 50
    assert all(split["duplicate_documents"] == 0 for split in report["splits"].values())


def test_files_to_hold_out(tmp_path):
    documents = some_documents(120)
    (tmp_path / "mine").mkdir()
    (tmp_path / "all").mkdir()
    write_text(tmp_path / "mine" / "one.txt", documents[:10])
    write_text(tmp_path / "mine" / "two.txt", documents[10:15])
    write_text(tmp_path / "all" / "a.txt", documents[5:])  # ten of them are held out, too
    held = [str(tmp_path / "mine" / "*.txt")]
    made = prepare([str(tmp_path / "all")], tmp_path / "out", heldout_files=held, vocab_size=100)
    assert sorted(read_back(made, "heldout")) == sorted(folded(documents[:15]))
    assert read_back(made, "train") == folded(documents[15:])
    assert (made.manifest["report"]["left_out_as_held_out"], made.manifest["report"]["copies_left_out"]) == (10, 0)
    assert made.manifest["source"]["heldout_files"] == held
    once = prepare([str(tmp_path / "all")], tmp_path / "once", heldout_files=held, vocab_size=100, dedup=True)
    assert [read_back(once, name) for name in ("train", "heldout")] == [
        read_back(made, name) for name in ("train", "heldout")
    ]
    # A file that is among the inputs as well is held out.
    both = prepare([str(tmp_path / "all"), str(tmp_path / "mine")], tmp_path / "b", heldout_files=held, vocab_size=100)
    assert read_back(both, "heldout") == read_back(made, "heldout")
    with pytest.raises(UserError, match=r"every document is in --heldout-files"):
        prepare([str(tmp_path / "mine")], tmp_path / "c", heldout_files=[str(tmp_path / "mine")])


def test_weights_are_kept_by_shard(tmp_path):
    documents = some_documents(120)
    write_text(tmp_path / "a.txt", documents[:60])
    (tmp_path / "b").mkdir()
    write_text(tmp_path / "b" / "1.txt", documents[60:])
    given = [str(tmp_path / "a.txt"), str(tmp_path / "b")]
    options = {"vocab_size": 100, "heldout": 0.1, "workers": 1}
    plain = prepare(given, tmp_path / "plain", **options)
    made = prepare(given, tmp_path / "out", weight=[f"{tmp_path}/b/*=2.5"], **options)
    assert read_back(made, "heldout") == read_back(plain, "heldout")
    assert sorted(read_back(made, "train")) == sorted(read_back(plain, "train"))
    shards = Corpus.open(tmp_path / "out").split("train").shards
    assert [shard.weight for shard in shards] == [1.0, 2.5]
    assert [shard.weight for shard in made.split("heldout").shards] == [1.0]
    heldout = set(read_back(made, "heldout"))
    assert shards[1].num_documents == sum(document not in heldout for document in folded(documents[60:]))
    counts = [np.bincount(shard.tokens, minlength=made.vocab_size) for shard in shards]
    weighted = counts[0] + 2.5 * counts[1]
    share = weighted[weighted > 0] / weighted.sum()
    assert made.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    for bad, message in (
        ("a.txt", "must be GLOB=NUMBER"),
        (f"{tmp_path}/a.txt=0.5", "a number of 1 to 100"),
        (f"{tmp_path}/a.txt=101", "a number of 1 to 100"),
        (f"{tmp_path}/none*=2", "matches no file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(given, tmp_path / "bad", weight=[bad], **options)
    with pytest.raises(UserError, match=r"a\.txt is not among the inputs"):
        prepare(given[1:], tmp_path / "bad", weight=[f"{given[0]}=2"], **options)


def test_skipped_records_are_told(tmp_path):
    lines = [json.dumps({"text": " ".join(d)}) for d in some_documents(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:20], '{"text": 3}', "{", *lines[20:]]))
    with pytest.warns(
        UserWarning, match=r"2 bad records are left out; the first: .*a\.jsonl:21: .* is a int.*jsonl:22"
    ):
        made = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", vocab_size=100, skip_bad_records=True)
    assert made.manifest["report"]["skipped_records"]["count"] == 2
    (tmp_path / "b.jsonl").write_text("{\n{\n")
    with pytest.raises(UserError, match=r"no record in .*b\.jsonl can be read \(.*b\.jsonl:1: not JSON"):
        prepare([str(tmp_path / "b.jsonl")], tmp_path / "b", skip_bad_records=True)


def test_each_line_a_document(tmp_path):
    documents = some_documents(60)
    (tmp_path / "a.txt").write_text("\n".join(" ".join(d) for d in documents))
    made = prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=100, documents="line")
    assert sorted(read_back(made, "train", "heldout")) == sorted(folded(documents))


def test_docstrings(tmp_path, monkeypatch):
    for i in range(40):
        source = "".join(
            f"def f{j}():\n    '''{' '.join(s)} {i}.'''\n" for j, s in enumerate(some_documents(3, seed=i))
        )
        (tmp_path / f"m{i}.py").write_text(source)
    monkeypatch.setattr(pydocs, "python_files", lambda: sorted(tmp_path.glob("m*.py")))
    made = prepare([], tmp_path / "out", corpus="pydocs", vocab_size=100, workers=1)
    source = made.manifest["source"]
    assert made.split("train").num_documents + made.split("heldout").num_documents == source["modules"]
    assert 30 < source["modules"] <= 40 < source["docstrings"]
    assert "inputs" not in source


def test_a_vocabulary_the_text_cannot_fill(tmp_path):
    text = write_text(tmp_path / "a.txt", some_documents(30))
    with pytest.warns(UserWarning, match="fill a vocabulary of 5000 tokens"):
        made = prepare([text], tmp_path / "out", vocab_size=5000)
    assert made.vocab_size < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "give either inputs"),
        ({"corpus": "pydocs"}, "not both"),
        ({"inputs": [], "corpus": "wikipedia"}, "no corpus 'wikipedia'"),
        ({"vocab_size": 15}, "--vocab-size must be at least 16"),
        ({"vocab_size": 100, "tokenizer": Path("t.json")}, "not both"),
        ({"tokenizer": Path("t.json")}, "t.json does not exist"),
        ({"vocab_size": 1 << 32}, "--vocab-size must be at most 4194304; got 4294967296"),
        ({"max_bytes": 1 << 70}, "--max-bytes must be at most"),
        ({"workers": 10**9}, "--workers must be at most 256"),
        ({"seed": 1 << 64}, "--seed"),
        ({"heldout": 0.0}, "--heldout"),
        ({"heldout": float("nan")}, "--heldout"),
        ({"max_bytes": 0}, "--max-bytes"),
        ({"workers": 0}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"sentences": "nltk"}, "no sentence splitter"),
        ({"inputs": ["missing.txt"]}, "missing.txt does not exist"),
        ({"max_bytes": 1}, r"--max-bytes 1 is less than the first document has, \d+ bytes"),
        ({"documents": "page"}, "--documents must be one of blank, line, file; got 'page'"),
        ({"format": "xml"}, "--format must be one of txt, md, jsonl"),
        ({"heldout_files": ["missing.txt"]}, "missing.txt does not exist"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    given = {"inputs": [write_text(tmp_path / "a.txt", some_documents(5))], **arguments}
    with pytest.raises(UserError, match=message) as error:
        prepare(out=tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "there is no text"),
        (b" \n\n\t\n", "there is no text"),
        (b"One document.", "no document can be held out"),
        (b"The same.\n\nThe same.\n\nThe  same.", "no document can be held out"),
        (b"Fine.\n\nText.\n\n\x00\x01", "a.txt is not a text file: a NUL byte at byte 14"),
    ],
)
def test_bad_text(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=50)
    assert os.listdir(tmp_path) == ["a.txt"]


def append(path):
    with open(path, "a") as file:
        file.write("\n\nOne more document.")


def rewrite(path):
    """Other text of the same length, with the old modification time."""
    state, text = path.stat(), path.read_text()
    (path.parent / "new").write_text(text.replace("the", "one"))
    os.replace(path.parent / "new", path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [append, rewrite, os.utime])
@pytest.mark.parametrize("moment", ["cut_parts", "train_tokenizer", "encode_documents"])
def test_a_text_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch, change, moment):
    original, changed = getattr(prepare_module, moment), []

    def changing(*args, **options):
        made = original(*args, **options)
        if not changed:  # a second file could get the inode of the first
            change(tmp_path / "a.txt")
            changed.append(moment)
        return made

    monkeypatch.setattr(parts_module, "BATCH_CHARS", 500)
    monkeypatch.setattr(prepare_module, moment, changing)
    with pytest.raises(UserError, match=r"a\.txt has changed while it was read.*start again"):
        prepare([write_text(tmp_path / "a.txt", some_documents(50))], tmp_path / "out", vocab_size=100, workers=1)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_many_tiny_documents_take_little_memory(tmp_path, monkeypatch):
    """The lists of documents are bounded in length, not in characters alone."""
    sizes = []

    def encode(documents, encoding):
        sizes.append(len(documents))
        return encode_documents(documents, encoding)

    monkeypatch.setattr(prepare_module, "encode_documents", encode)
    monkeypatch.setattr(parts_module, "BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(survey_module, "SAMPLE_DOCUMENTS", 200)
    words = [f"{word}{i}" for i in range(50) for word in WORDS]
    (tmp_path / "a.txt").write_text("\n\n".join(words))
    made = prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=100, workers=1)
    assert made.split("train").num_documents + made.split("heldout").num_documents == len(words)
    assert max(sizes) == 100
    samples = [survey(order, tmp_path, 0.1, 1 << 20).sample for order in (words, words[::-1])]
    assert len(samples[0]) <= 200
    assert sorted(samples[0]) == sorted(samples[1])


def test_an_existing_corpus_is_kept_unless_told(tmp_path):
    text = write_text(tmp_path / "a.txt", some_documents(30))
    prepare([text], tmp_path / "out", vocab_size=100)
    before = hashes(tmp_path / "out")
    with pytest.raises(CorpusError, match="--overwrite"):
        prepare([text], tmp_path / "out", vocab_size=110)
    (tmp_path / "bad.txt").write_bytes(b"\0")
    with pytest.raises(UserError, match="NUL"):
        prepare([text, str(tmp_path / "bad.txt")], tmp_path / "out", vocab_size=110, overwrite=True)
    assert hashes(tmp_path / "out") == before
    assert prepare([text], tmp_path / "out", vocab_size=110, overwrite=True).vocab_size == 110
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "bad.txt", "out"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("bug"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_crash_half_way_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(parts_module, "BATCH_CHARS", 500)
    add_block, calls = CorpusWriter.add_block, []

    def failing(self, *args):
        calls.append(sorted(os.listdir(tmp_path)))
        if len(calls) == 5:
            raise error
        add_block(self, *args)

    monkeypatch.setattr(CorpusWriter, "add_block", failing)
    with pytest.raises(type(error)) as caught:
        prepare([write_text(tmp_path / "a.txt", some_documents(50))], tmp_path / "out", vocab_size=100)
    assert any(name.startswith("out.partial-") for name in calls[-1])
    assert "out" not in calls[-1]
    assert os.listdir(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert str(tmp_path / "out") in str(caught.value)


def test_the_command(tmp_path):
    text = write_text(tmp_path / "a.txt", some_documents(100))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["prepare", text, "--out", str(out), "--vocab-size", "900", "--max-bytes", "10kB"])
    assert result.exit_code == 0, result.output
    assert "fusebert: warning: the text repeats too little" in result.output
    made = Corpus.open(out)
    for number in (made.split("train").num_tokens, made.split("heldout").num_documents, made.vocab_size):
        assert f"{number:,} " in result.output
    assert f"unigram entropy {made.unigram_entropy:.3f}" in result.output
    assert f"fusebert pretrain --data {out}" in result.output


def test_help_teaches():
    result = CliRunner().invoke(app, ["prepare", "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for word in ("--corpus pydocs", "--tokenizer", ".jsonl", "blank line", "30522"):
        assert word in result.output


def test_sizes():
    given = {"48MB": 48_000_000, "1.5 GiB": 3 << 29, "7": 7, "2k": 2000, "3mib": 3 << 20, "10B": 10}
    assert {text: parse_size(text) for text in given} == given
    for text in ("", "MB", "-1", "48XB", "1e6", "4 8"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)
    for text in ("9" * 5000, "9" * 30 + "TB"):
        with pytest.raises(UserError, match="too large"):
            parse_size(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cleans_up(tmp_path, number):
    running = subprocess.Popen(
        [sys.executable, "-m", "fusebert.train", "prepare", "-", "--out", str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.scratch-*/stdin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.glob("out.scratch-*/stdin"))
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode not in (0, None)
    assert os.listdir(tmp_path) == []
