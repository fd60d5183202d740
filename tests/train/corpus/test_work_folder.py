"""What killed processes leave beside a corpus: the next `prepare` removes it, and nothing else."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from small_corpus import write_text

from fusebert.train.corpus.format import CorpusError
from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.reader import Corpus
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.corpus.work_folder import WorkFolder, remove_leftovers
from fusebert.train.corpus.writer import CorpusWriter


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def in_a_process(work: Callable[[], object]) -> int:
    """Starts ``work`` in a copy of this process, which stops after it; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
            time.sleep(60)
        finally:
            os._exit(1)
    return process


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def wait_for(place: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while not (found := list(place.glob(pattern))) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found[0]


@pytest.fixture
def settings(tmp_path: Path) -> PrepareSettings:
    text = write_text(tmp_path / "text.txt", documents=40)
    return PrepareSettings(tmp_path / "out", [str(text)], vocab_size=120, workers=1, overwrite=True)


def test_leftovers_of_a_killed_prepare_go_and_those_of_a_living_one_stay(
    tmp_path: Path, settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(self: CorpusWriter, *block: object) -> None:
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(CorpusWriter, "add_block", wait)
        process = in_a_process(lambda: prepare(settings))
        partial = wait_for(tmp_path, "out.partial-*/tokenizer.json").parent
        scratch = wait_for(tmp_path, "out.scratch-*")
    prepare(settings)
    assert sorted(os.listdir(tmp_path)) == sorted(["out", partial.name, scratch.name, "text.txt"])
    kill(process)
    prepare(settings)
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]


@pytest.mark.parametrize("step", [1, 2])
def test_killed_while_the_corpora_are_exchanged(
    tmp_path: Path, settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the old corpus has gone, and between the two renames."""
    before = prepare(settings).manifest
    rename, calls = os.rename, []

    def dying(source: Path, target: Path) -> None:
        calls.append(source)
        die() if len(calls) == step else rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", dying)
        os.waitpid(in_a_process(lambda: prepare(settings)), 0)
    assert (tmp_path / "out").exists() == (step == 1)
    assert len(os.listdir(tmp_path)) == 4
    other = PrepareSettings(settings.out, settings.inputs, vocab_size=130)
    if step == 2:
        with pytest.warns(UserWarning, match="the corpus from before is there again"), pytest.raises(CorpusError):
            prepare(other)
    else:
        with pytest.raises(CorpusError, match="already holds a corpus"):
            prepare(other)
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]
    assert Corpus.open(settings.out, verify=True).manifest == before


def test_other_folders_with_such_names_stay(tmp_path: Path) -> None:
    names = ["out.partial-notes", "out.scratch-archives", "out.scratch-0a1b2c3d", "out2.partial-00000000", "out"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / "out.partial-12345678").write_text("a file")
    (tmp_path / "out.partial-23456789").symlink_to(tmp_path / "out")
    for name in ("out.partial-4711", "out.scratch-ab_cd123", "out.replaced-4711"):  # of earlier versions too
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / ".manifest.json.partial-4711").write_text("{")
    remove_leftovers(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out.partial-12345678", "out.partial-23456789"])
    remove_leftovers(tmp_path / "no" / "such" / "folder")


def test_a_folder_is_usable_by_others_when_it_becomes_a_corpus(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        partial, scratch = WorkFolder.make(tmp_path / "out", "partial"), WorkFolder.make(tmp_path / "out", "scratch")
    finally:
        os.umask(umask)
    assert [folder.path.stat().st_mode & 0o777 for folder in (partial, scratch)] == [0o755, 0o700]
    scratch.remove()
    partial.release()
    remove_leftovers(tmp_path / "out")
    assert os.listdir(tmp_path) == []
