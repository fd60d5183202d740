"""The corpus on disk: reading returns what was written, and damaged or unfinished corpora are refused."""

import collections
import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from fusebert.train.batches.passages import Passages
from fusebert.train.corpus import verify as verify_module
from fusebert.train.corpus.format import CorpusError, manifest_sha256
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.writer import CorpusWriter
from fusebert.train.text.special_tokens import SPECIAL_TOKENS
from fusebert.train.text.tokenizer import bert_tokenizer

PIECES = 400


def save_tokenizer(folder, pieces=PIECES):
    tokens = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(pieces)), "##ing", "##", "#"]
    path = folder / "given.json"
    bert_tokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True).save(str(path))
    return path


@pytest.fixture
def tokenizer_file(tmp_path):
    return save_tokenizer(tmp_path)


def random_documents(count, seed=0, vocab_size=PIECES):
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(5, vocab_size, rng.integers(1, 30)).tolist() for _ in range(rng.integers(1, 9))]
        for _ in range(count)
    ]


def read_back(split):
    return [
        [
            shard.tokens[shard.sentences[s] : shard.sentences[s + 1]].tolist()
            for s in range(shard.documents[d], shard.documents[d + 1])
        ]
        for shard in split.shards
        for d in range(shard.num_documents)
    ]


def write(directory, tokenizer_file, train, heldout, **options):
    with CorpusWriter(directory, tokenizer_file, **options) as writer:
        for split, documents in (("train", train), ("heldout", heldout)):
            for document in documents:
                writer.add(split, document)
        return writer.finish({"from": "a test"})


@pytest.fixture
def written(tmp_path, tokenizer_file):
    write(tmp_path / "made", tokenizer_file, random_documents(20), random_documents(3, seed=1))
    return tmp_path / "made"


@pytest.mark.parametrize("shard_tokens", [1, 300, 1 << 25])
def test_round_trip(tmp_path, tokenizer_file, shard_tokens):
    train, heldout = random_documents(40), random_documents(7, seed=1)
    made = write(tmp_path / "a" / "b", tokenizer_file, train, heldout, shard_tokens=shard_tokens)
    for corpus in (made, Corpus.open(str(tmp_path / "a" / "b"), verify=True)):
        for name, documents in (("train", train), ("heldout", heldout)):
            split = corpus.split(name)
            assert read_back(split) == documents
            assert split.num_documents == len(documents)
            assert split.num_sentences == sum(map(len, documents))
            assert split.num_tokens == sum(len(s) for d in documents for s in d)
    shards = made.split("train").shards
    assert {1: len(shards) == 40, 300: 5 < len(shards) < 40, 1 << 25: len(shards) == 1}[shard_tokens]
    assert shards[0].tokens.dtype == np.uint16
    assert isinstance(shards[0].tokens, np.memmap)
    assert made.manifest["source"] == {"from": "a test"}
    assert made.special == (0, 1, 2, 3, 4)
    assert made.vocab_size == PIECES + 8
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b"]


def test_short_sentences_end_a_shard_too(tmp_path, tokenizer_file):
    documents = [[[7]] * 3] * 50
    made = write(tmp_path / "made", tokenizer_file, documents, documents, shard_tokens=240)
    assert [shard.num_sentences for shard in made.split("train").shards] == [60, 60, 30]
    assert read_back(made.split("train")) == documents


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer_file = save_tokenizer(tmp_path, pieces=70_000)
    documents = [[[5, 69_999, 70_004]]]
    made = write(tmp_path / "made", tokenizer_file, documents, documents)
    assert made.split("train").shards[0].tokens.dtype == np.uint32
    assert read_back(made.split("train")) == documents


def test_blocks_are_documents_one_after_another(tmp_path, tokenizer_file):
    documents = [*random_documents(9), [[], [7, 8], []], [[]], [], [[9]]]
    with CorpusWriter(tmp_path / "made", tokenizer_file) as writer:
        sentences = [s for d in documents for s in d]
        tokens = np.array([t for s in sentences for t in s])
        writer.add_block("train", tokens, [len(s) for s in sentences], [len(d) for d in documents])
        for document in documents:
            writer.add("heldout", document)
        made = writer.finish({})
    # Empty sentences and documents do not exist.
    assert read_back(made.split("train")) == [*documents[:9], [[7, 8]], [[9]]]
    assert read_back(made.split("heldout")) == read_back(made.split("train"))


def test_unigram_entropy_is_that_of_the_training_tokens(tmp_path, tokenizer_file):
    train = random_documents(30)
    made = write(tmp_path / "made", tokenizer_file, train, [[[5] * 999]], shard_tokens=100)
    counts = collections.Counter(t for d in train for s in d for t in s)
    total = sum(counts.values())
    expected = -math.fsum(n / total * math.log(n / total) for n in counts.values())
    assert made.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_the_unigram_entropy_is_of_tokens_that_can_be_predicted(tmp_path, tokenizer_file):
    """[UNK] (1) is never masked. A single token has the entropy 0, not -0."""
    made = write(tmp_path / "a", tokenizer_file, [[[5, 1, 6, 1, 1, 1]]], [[[5]]])
    assert made.unigram_entropy == pytest.approx(math.log(2))
    for number, ids in enumerate(([5, 5], [1, 1])):
        made = write(tmp_path / f"b{number}", tokenizer_file, [[ids]], [[[5]]])
        assert f"{made.unigram_entropy:.3f}" == "0.000"


def test_pickles_without_its_arrays(written):
    corpus = Corpus.open(written)
    documents = read_back(corpus.split("train"))
    data = pickle.dumps(corpus)
    shards = [*corpus.split("train").shards, *corpus.split("heldout").shards]
    assert len(data) < len(pickle.dumps(Corpus.open(written))) + 100 * len(shards)  # inodes, no arrays
    assert read_back(pickle.loads(data).split("train")) == documents


def test_continues_word(written):
    corpus = Corpus.open(written)
    assert np.flatnonzero(corpus.continues_word).tolist() == [PIECES + 5]  # "##ing"; neither "##" nor "#"
    assert corpus.continues_word.shape == (corpus.vocab_size,)


def test_bad_blocks(tmp_path, tokenizer_file):
    with CorpusWriter(tmp_path / "made", tokenizer_file) as writer:
        for ids in ([PIECES + 8], [-1]):
            with pytest.raises(ValueError, match=rf"must be in \[0, {PIECES + 8}\)"):
                writer.add("train", [ids])
        with pytest.raises(ValueError, match="do not add up"):
            writer.add_block("train", np.arange(5), [2, 2], [2])
        with pytest.raises(ValueError, match="do not add up"):
            writer.add_block("train", np.arange(5), [2, 3], [3])
        with pytest.raises(ValueError, match="got 'test'"):
            writer.add("test", [[5]])
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1}}}))
    with pytest.raises(CorpusError, match="lacks the special tokens"):
        CorpusWriter(tmp_path / "made", path)
    with pytest.raises(ValueError, match="choose one of train, heldout"):
        write(tmp_path / "made", tokenizer_file, [[[5]]], [[[5]]]).split("test")


def test_an_exception_leaves_nothing(tmp_path, tokenizer_file):
    def interrupted():
        with CorpusWriter(tmp_path / "made", tokenizer_file, shard_tokens=1) as writer:
            writer.add("train", [[5]])
            assert any(tmp_path.glob("made.partial-*/train-00000.tokens.npy"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == [tokenizer_file.name]


def test_no_space_left_leaves_nothing(tmp_path, tokenizer_file, monkeypatch):
    replace, left = os.replace, 5  # files written before the disk is full: in the middle of the second shard

    def failing(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "made", tokenizer_file, random_documents(9), random_documents(1), shard_tokens=1)
    assert [p.name for p in tmp_path.iterdir()] == [tokenizer_file.name]


@pytest.mark.parametrize(("train", "heldout"), [([[[5]]], []), ([], [[[5]]]), ([[[]]], [[[5]]])])
def test_an_empty_split_is_no_corpus(tmp_path, tokenizer_file, train, heldout):
    with pytest.raises(CorpusError, match="would have no document"):
        write(tmp_path / "made", tokenizer_file, train, heldout)
    assert [p.name for p in tmp_path.iterdir()] == [tokenizer_file.name]


def test_overwrite_replaces_only_by_a_complete_corpus(written, tokenizer_file):
    before = read_back(Corpus.open(written).split("train"))
    with pytest.raises(CorpusError, match="--overwrite"):
        CorpusWriter(written, tokenizer_file)
    with pytest.raises(CorpusError, match="would have no document"):
        write(written, tokenizer_file, [[[5]]], [], overwrite=True)
    assert read_back(Corpus.open(written, verify=True).split("train")) == before
    write(written, tokenizer_file, [[[7]]], [[[8]]], overwrite=True)
    assert read_back(Corpus.open(written, verify=True).split("train")) == [[[7]]]
    assert sorted(p.name for p in written.parent.iterdir()) == sorted([written.name, tokenizer_file.name])


def test_a_failed_rename_puts_the_old_corpus_back(written, tokenizer_file, monkeypatch):
    before = read_back(Corpus.open(written).split("train"))
    rename = os.rename
    monkeypatch.setattr(
        os,
        "rename",
        lambda a, b: (_ for _ in ()).throw(OSError("moved")) if ".partial-" in str(a) else rename(a, b),
    )
    with pytest.raises(OSError, match="moved"):
        write(written, tokenizer_file, [[[7]]], [[[8]]], overwrite=True)
    assert read_back(Corpus.open(written, verify=True).split("train")) == before


def test_what_is_no_corpus_is_never_replaced(tmp_path, tokenizer_file, written, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (written / "notes.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("folder", "is not empty"), (written.name, "notes.txt")):
        with pytest.raises(CorpusError, match=message):
            CorpusWriter(tmp_path / name, tokenizer_file, overwrite=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CorpusError, match="current folder"):
        CorpusWriter(".", tokenizer_file)
    monkeypatch.undo()
    write(tmp_path / "empty", tokenizer_file, [[[7]]], [[[8]]])
    Corpus.open(tmp_path / "empty")


def edit_manifest(directory, change, signed=False):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if signed:
        manifest["sha256"] = manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))


def first_shard(manifest):
    return manifest["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "not a finished corpus"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda d: (d / "manifest.json").write_text("[]"), "not a JSON object"),
        (lambda d: (d / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "not the tokenizer"),
        (lambda d: (d / "train-00000.tokens.npy").unlink(), "is missing"),
        (lambda d: os.truncate(d / "train-00000.tokens.npy", 200), "200 bytes where"),
        (lambda d: (d / "heldout-00000.documents.npy").write_bytes(b""), "0 bytes where"),
        (lambda d: edit_manifest(d, lambda m: m.update(version=2)), "format version 2"),
        (lambda d: edit_manifest(d, lambda m: m.pop("splits")), "split train"),
        (lambda d: edit_manifest(d, lambda m: m["splits"].pop("heldout")), "split heldout"),
        (lambda d: edit_manifest(d, lambda m: m["splits"]["train"].update(shards=[])), "is empty"),
        (lambda d: edit_manifest(d, lambda m: m["splits"]["train"]["shards"][0].update(tokens="9")), "a shard"),
        (lambda d: edit_manifest(d, lambda m: m["splits"]["train"]["shards"][0].pop("files")), "files of"),
        (lambda d: edit_manifest(d, lambda m: m["special_tokens"].update(mask=10**6)), "outside the vocabulary"),
        (lambda d: edit_manifest(d, lambda m: m.update(vocab_size=None)), "vocab_size"),
        (lambda d: edit_manifest(d, lambda m: m.pop("unigram_entropy")), "unigram_entropy"),
        (lambda d: edit_manifest(d, lambda m: m.pop("tokenizer")), "tokenizer"),
        (lambda d: edit_manifest(d, lambda m: m["source"].update({"from": "elsewhere"})), "sha256 is that of another"),
        (lambda d: edit_manifest(d, lambda m: m.update(sha256="0" * 64)), "sha256 is that of another"),
        (lambda d: edit_manifest(d, lambda m: m.update(shb256=m.pop("sha256"))), "unknown field 'shb256'"),
        (lambda d: (d / "manifest.json").write_text('{"version": ' + "9" * 5000 + "}"), "cannot be read"),
        (lambda d: (d / "manifest.json").write_bytes(b" " * (17 << 20)), "longer than 16 MiB"),
        (lambda d: ((d / "manifest.json").unlink(), os.mkfifo(d / "manifest.json")), "not a finished corpus"),
    ],
)
def test_damage_is_found_on_opening(written, damage, message):
    damage(written)
    with pytest.raises(CorpusError, match=message) as error:
        Corpus.open(written)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(vocab_size=10**9), "vocab_size"),
        (lambda m: m.update(vocab_size=True), "vocab_size"),
        (lambda m: m.update(unigram_entropy=float("nan")), "unigram_entropy"),
        (lambda m: m.update(unigram_entropy=math.inf), "unigram_entropy"),
        (lambda m: m.update(unigram_entropy=100.0), "unigram_entropy"),
        (lambda m: m.update(unigram_entropy=True), "unigram_entropy"),
        (lambda m: m["tokenizer"].update(sha256="0"), "tokenizer"),
        (lambda m: m.update(source=None), "source"),
        (lambda m: m["special_tokens"].update(pad=False), "special_tokens"),
        (lambda m: m["special_tokens"].update(pad=[0]), "special_tokens"),
        (lambda m: m["special_tokens"].update(mask=-1), "special_tokens"),
        (lambda m: m["special_tokens"].update(pad=1), "one id"),
        (lambda m: m["splits"]["train"].update(tokens=1), "tokens of the split train"),
        (lambda m: m["splits"]["heldout"].pop("documents"), "documents of the split heldout"),
        (lambda m: first_shard(m).update(tokens=10**30), "a shard of train"),
        (lambda m: first_shard(m).update(sentences=10**9), "a shard of train"),
        (lambda m: first_shard(m)["files"]["tokens"].update(bytes=1.5), "files of"),
        (lambda m: first_shard(m)["files"]["tokens"].update(sha256=7), "files of"),
        (lambda m: first_shard(m).update(weight=0), "the weight of a shard of train"),
        (lambda m: first_shard(m).update(weight="2"), "the weight of a shard of train"),
        (lambda m: m.update(report=[]), "report"),
    ],
)
def test_a_manifest_is_checked_field_by_field(written, change, message):
    """Even if its hash is right."""
    edit_manifest(written, change, signed=True)
    with pytest.raises(CorpusError, match=message) as error:
        Corpus.open(written)
    assert "\n" not in str(error.value)


def test_a_corpus_without_a_hash_of_its_manifest_is_read(written):
    """As versions up to 0.1.0 wrote it."""
    edit_manifest(written, lambda m: m.pop("sha256"))
    assert Corpus.open(written, verify=True).split("heldout").num_documents == 3


def test_no_folder_no_corpus(tmp_path, written):
    for path in (tmp_path / "nothing", written / "manifest.json"):
        with pytest.raises(CorpusError, match="fusebert prepare"):
            Corpus.open(path)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def overwrite_entry(path, index, value):
    array = np.load(path)
    array[index] = value
    np.save(path, array)  # of the same size


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("sentences", 3, 10**9), ("sentences", 0, 1), ("sentences", -1, 10**9), ("documents", 2, 0), ("documents", 1, -1)],
)
def test_offsets_never_lead_outside(written, name, index, value):
    overwrite_entry(written / f"train-00000.{name}.npy", index, value)
    shard = Corpus.open(written).split("train").shards[0]
    with pytest.raises(CorpusError, match="offsets do not rise"):
        getattr(shard, name)


def test_another_dtype_or_a_pickle_is_not_read(written):
    path = written / "train-00000.tokens.npy"
    size, tokens = path.stat().st_size, np.load(path)
    np.save(path, tokens.astype(np.int16))
    with pytest.raises(CorpusError, match="int16"):
        _ = Corpus.open(written).split("train").shards[0].tokens
    np.save(path, np.array([None]), allow_pickle=True)
    os.truncate(path, size)
    with pytest.raises(CorpusError, match="cannot be read"):
        _ = Corpus.open(written).split("train").shards[0].tokens


def test_verify_finds_a_flipped_bit(written):
    path = written / "heldout-00000.tokens.npy"
    flip_a_bit(path)
    Corpus.open(written)
    with pytest.raises(CorpusError, match="sha256 differs"):
        Corpus.open(written, verify=True)


def test_files_that_passed_are_read_again_when_they_change(written, monkeypatch):
    hashed = []
    original = verify_module.file_sha256
    monkeypatch.setattr(verify_module, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    Corpus.open(written).verify()
    assert len(hashed) == 6
    Corpus.open(written).verify()
    assert len(hashed) == 6
    os.utime(written / "train-00000.tokens.npy")
    Corpus.open(written).verify()
    assert hashed[6:] == ["train-00000.tokens.npy"]
    copy = written / "copy"
    copy.write_bytes((written / "train-00000.documents.npy").read_bytes())
    state = (written / "train-00000.documents.npy").stat()
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(copy, written / "train-00000.documents.npy")  # as `cp --preserve` makes it
    Corpus.open(written).verify()
    assert hashed[7:] == ["train-00000.documents.npy"]
    for content in (b"{", b"[]", b'{"train-00000.tokens.npy": 1}'):
        (written / "verified.json").write_bytes(content)
        Corpus.open(written).verify()
    assert len(hashed) == 8 + 3 * 6


@pytest.mark.parametrize("name", ["tokens", "sentences", "documents"])
def test_verifying_finds_a_flipped_bit_and_remembers_nothing(written, name):
    Corpus.open(written).verify()
    flip_a_bit(written / f"train-00000.{name}.npy")
    for _ in range(2):
        with pytest.raises(CorpusError, match=rf"train-00000\.{name}\.npy is damaged: its sha256 differs"):
            Corpus.open(written).verify()


def test_verifying_a_folder_that_cannot_be_written(written, monkeypatch):
    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", denied)
    Corpus.open(written).verify()
    assert not (written / "verified.json").exists()


def test_a_verified_corpus_can_be_replaced(written, tokenizer_file):
    Corpus.open(written).verify()
    write(written, tokenizer_file, [[[7]]], [[[8]]], overwrite=True).verify()
    assert (written / "verified.json").is_file()


def test_ids_outside_the_vocabulary_are_found_when_a_shard_is_mapped(written):
    overwrite_entry(written / "train-00000.tokens.npy", 3, PIECES + 8)
    shard = Corpus.open(written).split("train").shards[0]
    with pytest.raises(CorpusError, match=rf"has the id {PIECES + 8}, and the vocabulary is of {PIECES + 8}"):
        _ = shard.tokens


@pytest.mark.parametrize("name", ["tokens", "sentences", "documents"])
def test_a_file_cut_short_while_it_is_mapped(written, name):
    corpus = Corpus.open(written)
    passages = Passages(corpus.split("train"), 100)
    passages.read(np.array([0]))
    os.truncate(written / f"train-00000.{name}.npy", 100)
    with pytest.raises(CorpusError, match=rf"train-00000\.{name}\.npy became shorter while it was read"):
        passages.read(np.array([0]))
    os.truncate(written / f"heldout-00000.{name}.npy", 100)
    with pytest.raises(CorpusError, match=rf"heldout-00000\.{name}\.npy cannot be read"):
        getattr(corpus.split("heldout").shards[0], name)


def test_a_file_cut_short_between_the_check_and_the_reading(tmp_path, tokenizer_file):
    """The process would end by SIGBUS without a word. It ends with an error that names the file."""
    document = [list(range(5, 395))] * 30
    write(tmp_path / "made", tokenizer_file, [document], [document])
    script = (
        "import os, sys, pathlib, signal\n"
        "from fusebert.train.corpus.reader import Corpus\n"
        "made = pathlib.Path(sys.argv[1])\n"
        "tokens = Corpus.open(made).split('train').shards[0].tokens\n"
        "if sys.argv[2] == 'cut': os.truncate(made / 'train-00000.tokens.npy', 200)\n"
        "else: os.kill(os.getpid(), signal.SIGBUS), os.kill(os.getpid(), signal.SIGBUS)\n"
        "print(tokens.sum())\n"
    )

    def run(what):
        words = [sys.executable, "-c", script, str(tmp_path / "made"), what]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert run("other").returncode == -signal.SIGBUS
    done = run("cut")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("fusebert: error: ")
    assert "train-00000.tokens.npy became shorter while it was read" in done.stderr
