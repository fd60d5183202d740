"""`prepare --executor dask:ADDRESS`: the workers read the text, and the corpus is the local one, also if some die."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import fsspec
import pytest
import zstandard
from small_corpus import write_text
from typer.testing import CliRunner

from fusebert.train.cli import app
from fusebert.train.corpus import on_cluster
from fusebert.train.corpus import parts as parts_module
from fusebert.train.corpus import prepare as prepare_module
from fusebert.train.corpus.inputs import Inputs
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.corpus.writer import CorpusWriter
from fusebert.train.errors import UserError
from fusebert.train.text import cluster
from fusebert.train.text.text_file import TextFile

dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")

pytestmark = pytest.mark.filterwarnings("ignore:only .* are held out", "ignore:.* bad records are left out")


@pytest.fixture(scope="module")
def address():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),  # not 30 s for each worker that has died
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as workers,
    ):
        yield workers.scheduler_address


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of few documents, which this process cuts."""
    monkeypatch.setattr(on_cluster, "FILES_BYTES", 8_000)
    monkeypatch.setattr(parts_module, "PART_BYTES", 15_000)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        write_text(folder / f"{number}.txt", 40, seed=number)
    return folder


def make(inputs: Path | list[str], out: Path, executor: str = "local", **options) -> Corpus:
    given = inputs if isinstance(inputs, list) else [str(inputs)]
    options = {"vocab_size": 240, "heldout": 0.1, "workers": 1} | options
    return prepare_module.prepare(PrepareSettings(out, given, executor=executor, **options))


def content(corpus: Corpus) -> dict[str, object]:
    """Every file, and the manifest but for the command to go on with, which names the folder, and its hash."""
    files = {path.name: path.read_bytes() for path in corpus.directory.iterdir() if path.name != "manifest.json"}
    manifest = {name: value for name, value in corpus.manifest.items() if name != "sha256"}
    manifest["report"] = {name: value for name, value in manifest["report"].items() if name != "next"}
    return {**files, "manifest": manifest}


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of `Inputs.documents`: each is a pass that this process reads."""
    calls, documents = [], Inputs.documents

    def counted(self, progress):
        calls.append(1)
        return documents(self, progress)

    monkeypatch.setattr(Inputs, "documents", counted)
    return calls


@pytest.mark.usefixtures("small_tasks")
def test_every_input_is_the_local_corpus(text, tmp_path, address, monkeypatch, read_here):
    """Text, records with bad ones, copies, weights, files that are held out, URLs, and names relative to a folder that
    the workers are not in; a vocabulary from a part of the text."""
    records = write_text(tmp_path / "records.txt", 300, seed=50).read_text().split("\n\n")
    for number in range(3):
        lines = [json.dumps({"text": record}) for record in records[100 * number : 100 * number + 100]]
        lines[10 * number : 10 * number] = ["{", '{"text": 3}'][: number + 1]
        (text / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (text / "copy.txt").write_bytes((text / "3.txt").read_bytes())
    (text / "empty.txt").write_bytes(b"\n")
    monkeypatch.setattr(prepare_module, "SAMPLE_CHARS", 20_000)
    monkeypatch.chdir(tmp_path)
    given = ["text/*.gz", "text", f"file://{text}/copy.txt", "records.txt"]
    options = {
        "heldout_files": ["text/5.txt", f"file://{text}/7.txt"],
        "weight": ["text/2*=1.1", f"file://{text}/copy.txt=3", "records.txt=1.7"],
        "skip_bad_records": True,
    }
    for name, more in (("kept", {}), ("dedup", {"dedup": True}), ("share", {"heldout_files": None})):
        ours = make(given, tmp_path / name, **options | more)
        assert len(read_here) == 2
        theirs = make(given, tmp_path / f"{name}-cluster", f"dask:{address}", **options | more)
        assert len(read_here) == 2
        read_here.clear()
        assert content(theirs) == content(ours)
        skipped = theirs.manifest["report"]["skipped_records"]
        assert skipped["count"] == 5
        assert len(skipped["first"]) == 3


def test_a_file_of_several_batches_is_the_local_corpus(tmp_path, address, monkeypatch, read_here):
    monkeypatch.setattr(parts_module, "PART_BYTES", 1 << 20)
    given = write_text(tmp_path / "a.txt", 3000)
    assert given.stat().st_size > 540_000 > parts_module.BATCH_CHARS
    ours = make(given, tmp_path / "local")
    theirs = make(given, tmp_path / "cluster", f"dask:{address}")
    assert content(theirs) == content(ours)
    # Files of more than 32 parts are read by this process in the second pass.
    monkeypatch.setattr(parts_module, "LARGEST_PART_BYTES", 1 << 14)
    ours = make(given, tmp_path / "large")
    assert content(make(given, tmp_path / "large-cluster", f"dask:{address}")) == content(ours)
    # Those up to a limit are read by this process in the first pass.
    read_here.clear()
    capped = make(given, tmp_path / "capped", max_bytes=100_000)
    theirs = make(given, tmp_path / "capped-cluster", f"dask:{address}", max_bytes=100_000)
    assert len(read_here) == 2 + 1
    assert content(theirs) == content(capped)


@pytest.mark.usefixtures("small_tasks")
def test_standard_input(tmp_path, address, monkeypatch):
    data = write_text(tmp_path / "a.txt", 300).read_bytes()
    made = []
    for executor in ("local", f"dask:{address}"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        made.append(content(make(["-"], tmp_path / executor[:4], executor)))
    assert made[0] == made[1]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("dying_pass", [0, 1])
def test_a_worker_that_dies_costs_its_task(text, tmp_path, address, monkeypatch, dying_pass):
    original, passes, killed = cluster.Cluster.map, [], []

    def with_a_death(self, function, tasks):
        passes.append(function)
        for number, result in enumerate(original(self, function, tasks)):
            if len(passes) == dying_pass + 1 and number == 2:
                killed.append(next(iter(self._client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)
            yield result

    monkeypatch.setattr(cluster.Cluster, "map", with_a_death)
    theirs = make(text, tmp_path / "cluster", f"dask:{address}")
    assert len(passes) == 2
    assert killed
    assert content(theirs) == content(make(text, tmp_path / "local"))


@pytest.mark.usefixtures("small_tasks")
def test_the_progress_bars_move_and_reach_their_ends(text, tmp_path, address, monkeypatch):
    bars = []

    class Bar(contextlib.nullcontext):
        def __init__(self, description, total, show):
            super().__init__(self)
            self.total, self.updates = total, []
            bars.append(self)

        def update(self, size):
            self.updates.append(size)

    monkeypatch.setattr(prepare_module, "_bar", Bar)
    make(text, tmp_path / "out", f"dask:{address}")
    assert len(bars) == 2
    for bar in bars:
        assert len(bar.updates) > 5
        assert sum(bar.updates) == bar.total == sum(path.stat().st_size for path in text.iterdir())


def append(path: Path) -> None:
    with open(path, "a") as file:
        file.write("\n\nOne more document.")


def rewrite(path: Path) -> None:
    """Other text of the same length, with the old modification time."""
    state, words = path.stat(), path.read_text()
    (path.parent / "new").write_text(words.replace("the", "one"))
    os.replace(path.parent / "new", path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("change", [append, rewrite, os.utime])
def test_a_file_that_changes_between_the_passes(text, tmp_path, address, monkeypatch, change):
    cut_parts = prepare_module.cut_parts

    def changing(*args):
        change(text / "4.txt")
        return cut_parts(*args)

    monkeypatch.setattr(prepare_module, "cut_parts", changing)
    with pytest.raises(UserError, match=r"4\.txt has changed while it was read.*start again"):
        make(text, tmp_path / "out", f"dask:{address}")
    assert os.listdir(tmp_path) == ["text"]


def test_errors_of_the_text_are_those_of_one_machine(text, tmp_path, address):
    (text / "5.txt").write_bytes(b"Fine.\n\n\x00")
    said = []
    for executor in ("local", f"dask:{address}"):
        with pytest.raises(UserError) as error:
            make(text, tmp_path / "out", executor)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "5.txt is not a text file: a NUL byte" in said[0]
    assert os.listdir(tmp_path) == ["text"]


def test_a_worker_that_does_not_see_an_input(text, tmp_path, address, monkeypatch):
    memory = fsspec.filesystem("memory")  # each process has its own
    memory.pipe("/a.txt", b"One.\n\nTwo.")
    hint = r"every worker must see the inputs, in a folder that all share under the same path"
    with pytest.raises(UserError, match=rf"memory:///a\.txt cannot be read on the worker \S+ \(.*{hint}"):
        make(["memory://a.txt"], tmp_path / "out", f"dask:{address}")
    memory.rm("/a.txt")
    monkeypatch.setattr(TextFile, "absolute", lambda file: TextFile(tmp_path / "elsewhere" / file.path.name, file.name))
    with pytest.raises(UserError, match=rf"text/0\.txt cannot be read on the worker .*No such file.*{hint}") as error:
        make(text, tmp_path / "out", f"dask:{address}")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("package", ["fusebert", "tokenizers", "blingfire"])
def test_workers_of_another_version_are_refused(text, tmp_path, address, monkeypatch, package):
    other = {**cluster.versions(), package: "0.0.1"}
    monkeypatch.setattr(cluster, "versions", lambda: other)
    message = rf"^the worker \S+ has {package} \S.*, and prepare runs with 0.0.1: install the same"
    with pytest.raises(UserError, match=message):
        make(text, tmp_path / "out", f"dask:{address}")
    # Also those that join later.
    monkeypatch.setattr(cluster.Cluster, "_check_workers", lambda *args: None)
    with pytest.raises(UserError, match=message):
        make(text, tmp_path / "out", f"dask:{address}")
    assert os.listdir(tmp_path) == ["text"]


def test_workers_without_the_folder_are_told(address):
    with pytest.raises(UserError, match=r"does not see /nowhere/out: --out must be in a folder that all workers share"):
        cluster.Cluster(address, Path("/nowhere/out"))


def test_no_scheduler(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match=r"--executor dask:tcp://127.0.0.1:9: no scheduler answers there"):
        make(text, tmp_path / "out", "dask:tcp://127.0.0.1:9")
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.usefixtures("small_tasks")
def test_a_stopped_run_leaves_nothing(text, tmp_path, address, monkeypatch):
    calls, add_block = [], CorpusWriter.add_block

    def stopping(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add_block(self, *args)

    monkeypatch.setattr(CorpusWriter, "add_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(text, tmp_path / "out", f"dask:{address}")
    assert os.listdir(tmp_path) == ["text"]
    with distributed.Client(address, set_as_default=False) as client:
        deadline = time.monotonic() + 30
        while left := client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks)):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.mark.usefixtures("small_tasks")
def test_a_scheduler_that_dies(text, tmp_path, monkeypatch):
    original = cluster.Cluster.map
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        workers = distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0", silence_logs=50
        )

        def with_a_death(self, function, tasks):
            for result in original(self, function, tasks):
                workers.close()
                yield result

        monkeypatch.setattr(cluster.Cluster, "map", with_a_death)
        with pytest.raises(UserError, match="the Dask scheduler has gone: start again"):
            make(text, tmp_path / "out", f"dask:{workers.scheduler_address}")
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("executor", ["dask", "dask:", "ray:x"])
def test_executors_that_are_none(executor):
    with pytest.raises(UserError, match="--executor must be local or dask:ADDRESS"):
        PrepareSettings(Path("out"), ["a.txt"], executor=executor)


def test_the_command_of_the_docs(tmp_path, address, monkeypatch):
    page = (Path(__file__).resolve().parents[3] / "docs" / "scale-out.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    fusebert (prepare .* --executor .*)$", page, flags=re.M)
    texts = write_text(tmp_path / "a.txt", 100).read_text().split("\n\n")
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "1.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    places = {"s3://bucket": f"file://{tmp_path}", "/shared": str(tmp_path / "out"), "tcp://scheduler:8786": address}
    for there, here in places.items():
        assert there in line
        line = line.replace(there, here)
    made = CliRunner().invoke(app, [*shlex.split(line), "--vocab-size=240", "--heldout=0.1"])
    assert made.exit_code == 0, made.output
    assert Corpus.open(tmp_path / "out" / "wiki").split("train").num_documents > 80
