"""`prepare --executor dask:ADDRESS`: the corpus is the local one, also if a worker dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from small_corpus import write_text

from fusebert.train.corpus import prepare as prepare_module
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.errors import UserError
from fusebert.train.text import cluster

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def address():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as workers:
        yield workers.scheduler_address


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text of several tasks."""
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 2000)
    return write_text(tmp_path / "a.txt", 300)


def make(text: Path, out: Path, executor: str = "local") -> Corpus:
    settings = PrepareSettings(out, [str(text)], vocab_size=240, heldout=0.1, workers=1, executor=executor)
    return prepare_module.prepare(settings)


def content(corpus: Corpus) -> dict[str, object]:
    """Every file, and the manifest but for the command to go on with, which names the folder."""
    files = {path.name: path.read_bytes() for path in corpus.directory.iterdir() if path.name != "manifest.json"}
    report = {name: value for name, value in corpus.manifest["report"].items() if name != "next"}
    return {**files, "splits": corpus.manifest["splits"], "report": report}


def test_the_corpus_is_the_local_one_although_a_worker_dies(text, tmp_path, address, monkeypatch):
    original, killed = cluster.cluster_map, []

    def with_a_death(*args, **kwargs):
        for number, result in enumerate(original(*args, **kwargs)):
            if number == 3:
                with distributed.Client(address, set_as_default=False) as client:
                    killed.append(next(iter(client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)
            yield result

    monkeypatch.setattr(prepare_module, "cluster_map", with_a_death)
    ours = make(text, tmp_path / "local")
    theirs = make(text, tmp_path / "cluster", f"dask:{address}")
    assert killed
    assert content(theirs) == content(ours)


def test_workers_of_another_version_are_refused(text, tmp_path, address, monkeypatch):
    monkeypatch.setattr("tokenizers.__version__", "0.0.1")
    with pytest.raises(UserError, match=r"has tokenizers \S+, this machine 0.0.1"):
        make(text, tmp_path / "out", f"dask:{address}")
    assert not (tmp_path / "out").exists()


def test_workers_without_the_folder_are_told(address):
    missing = Path("/nowhere/tokenizer.json")
    with pytest.raises(UserError, match=r"do not see /nowhere/tokenizer.json: --out must be in a folder"):
        list(cluster.cluster_map(len, ["a"], address=address, initializer=print, initargs=(missing,)))


def test_no_scheduler(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match=r"--executor dask:tcp://127.0.0.1:9: no scheduler answers there"):
        make(text, tmp_path / "out", "dask:tcp://127.0.0.1:9")


@pytest.mark.parametrize("executor", ["dask", "dask:", "ray:x"])
def test_executors_that_are_none(executor):
    with pytest.raises(UserError, match="--executor must be local or dask:ADDRESS"):
        PrepareSettings(Path("out"), ["a.txt"], executor=executor)
