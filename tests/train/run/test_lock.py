"""Two runs in one folder: the second is refused, and nothing of the first is touched."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL
from small_corpus import make_corpus

from fusebert.train.errors import UserError
from fusebert.train.run.lock import RunLock
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings

HOLDS = """
import sys, time
from pathlib import Path
from fusebert.train.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def holder(out: Path) -> subprocess.Popen[str]:
    """A process that holds ``out``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    out = tmp_path / "run"
    process = holder(out)
    settings: dict[str, Any] = {**SMALL, "steps": 1, "resume": True}
    with pytest.raises(UserError, match=rf"another run is writing to .*process {process.pid} on .*another --out"):
        pretrain(PretrainSettings(data=corpus, out=out, **settings), resume_command="RESUME")
    assert [path.name for path in out.iterdir()] == [".lock"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert pretrain(PretrainSettings(data=corpus, out=out, **settings), resume_command="RESUME") is not None


def test_a_worker_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """A fork outlives the process that held the folder."""
    lock = RunLock(tmp_path / "run")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    lock.release()
    other = holder(tmp_path / "run")
    os.write(write, b"x")
    os.waitpid(child, 0)
    other.kill()
    other.communicate()


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    RunLock(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    RunLock(tmp_path / "old").release()
    assert (tmp_path / "old").exists()
    lock = RunLock(tmp_path / "used")
    (tmp_path / "used" / "log.jsonl").write_text("")
    lock.release()
    assert (tmp_path / "used").exists()
