"""Runs `fusebert pretrain` in forked processes, and sends them a signal at a chosen moment.

    python forked_runs.py JOBS.json RESULTS.json

PyTorch is imported once, in this process, which computes nothing itself, so that a fork is safe. A job is {"words":
command line, "signal": number, "at": name of a point or seconds, "twice": bool, "to": "group" (as a terminal does),
"parent" of the training processes, "all" (as Slurm does) or "rank 1"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
SECONDS = 60.0  # generous, because a busy machine is ten times slower


def run_jobs(jobs: list[dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    """Runs the jobs in a new process, one after the other, and returns for each: status, seconds after the signal,
    output, and the processes that were still alive afterwards."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, __file__, str(place / "jobs.json"), str(place / "results.json")]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    results: list[dict[str, Any]] = json.loads((place / "results.json").read_text())
    return results


def _points() -> dict[str, tuple[Any, str]]:
    """Moments of a run: the signal comes when this function is called."""
    import multiprocessing.popen_fork

    from fusebert.train.batches import dataset
    from fusebert.train.corpus import reader
    from fusebert.train.run import checkpoint, evaluate, loop, pretrain, setup
    from fusebert.train.step import step

    return {
        "corpus": (reader.Corpus, "open"),
        "model": (setup, "make_model"),
        "matmul": (setup, "matmul_rate"),
        "workers": (multiprocessing.popen_fork.Popen, "_launch"),
        "first batch": (loop.Supply, "fetch"),
        "step": (step.TrainingStep, "__call__"),
        "evaluation": (evaluate, "autocast"),
        "save": (checkpoint, "_write"),
        "export": (pretrain, "save_hf"),
        "chunk": (dataset.PackedExamples, "__getitem__"),
    }


def _hook(name: str, number: int, action: Callable[[], None]) -> None:
    owner, attribute = _points()[name]
    original, calls = owner.__dict__[attribute], [0]
    function = original.__func__ if isinstance(original, classmethod) else original

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            action()
        return function(*args, **kwargs)

    setattr(owner, attribute, classmethod(hooked) if isinstance(original, classmethod) else hooked)


def _child(job: dict[str, Any], output: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as fusebert.train.__main__ does
    os.setsid()
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from fusebert.train import cli

    parent = os.getpid()

    def send() -> None:
        to = job.get("to", "group")
        if os.environ.get("RANK", "0") != ("1" if to == "rank 1" else "0"):
            return
        (output.parent / "sent").write_text("")
        for number in range(2 if job.get("twice") else 1):
            if number and to != "group":
                time.sleep(0.2)  # a second signal of a kind is lost while the first one waits for its process
            if to == "group":
                os.killpg(os.getpgid(parent), job["signal"])  # the loader workers receive it too
            else:
                own = [] if to == "parent" else [os.getpid()] if to == "rank 1" else _children(parent)
                for process in [*own, *([] if to == "rank 1" else [parent])]:
                    os.kill(process, job["signal"])

    if isinstance(job["at"], str) and job["at"] != "never":
        name, _, number = job["at"].partition("/")
        _hook(name, int(number or 1), send)
    sys.argv = ["fusebert", *job["words"]]
    cli.main()


def _children(parent: int) -> list[int]:
    """The living children of ``parent``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


def _run(job: dict[str, Any], place: Path) -> dict[str, Any]:
    output, sent = place / "output", place / "sent"
    sent.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        status = 70
        try:
            _child(job, output)
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        finally:
            import atexit

            sys.stdout.flush()
            sys.stderr.flush()
            atexit._run_exitfuncs()
            os._exit(status)
    started, sent_at = time.monotonic(), 0.0
    found = 0
    while not found and time.monotonic() < started + SECONDS:
        if not sent_at and sent.exists():
            sent_at = time.monotonic()
        if not sent_at and not isinstance(job["at"], str) and time.monotonic() > started + job["at"]:
            sent.write_text("")
            os.killpg(process, job["signal"])
        time.sleep(0.01)
        found, status = os.waitpid(process, os.WNOHANG)
    ended = time.monotonic()
    if not found:
        os.killpg(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    left = _children(os.getpid())  # orphans come to this process
    while left and time.monotonic() < ended + 20.0:
        time.sleep(0.05)
        left = _children(os.getpid())
    for each in left:
        os.kill(each, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0 if left else os.WNOHANG)[0]:
            pass
    return {
        "status": os.waitstatus_to_exitcode(status),
        "ended": bool(found),
        "sent": sent.exists(),
        "seconds": ended - (sent_at or started),
        "output": output.read_text(),
        "left": len(left),
    }


def main() -> None:
    import matplotlib.figure  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401

    import fusebert.train.run.pretrain  # noqa: F401

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    _points()
    jobs, results = (Path(word) for word in sys.argv[1:])
    made = [_run(job, jobs.parent) for job in json.loads(jobs.read_text())]
    results.write_text(json.dumps(made))


if __name__ == "__main__":
    main()
