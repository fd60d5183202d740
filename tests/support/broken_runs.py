"""Commands of `fusebert` in forked processes that are killed, or find the disk full, from a chosen moment on.

The forking process must have imported PyTorch and computed nothing, so that a fork is safe and takes milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 120.0  # generous, because a busy machine is ten times slower
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


@dataclasses.dataclass
class Ended:
    """How a command ended.

    Attributes:
        status: of the exit; minus the signal if one ended it; None if it had not ended after `SECONDS`.
        output: stdout and stderr.
        events: number of file events of the main process, if the command ended by itself.
    """

    status: int | None
    output: str
    events: int


def import_everything() -> None:
    """Imports what a run needs. Call it once, before `run`."""
    # Most are imported by others, on first use.
    for name in (
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "pydantic.type_adapter",
        "safetensors.torch",
        "tokenizers",
        "torch._dynamo",
        "typer._adapters",
        "fusebert.train.cli",
        "fusebert.train.run.pretrain",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from fusebert.train.step import flops

    flops.MATMUL_SIZE["cpu"] = 64  # the denominator of MFU, which takes longer than these runs


def run(words: Sequence[str], place: Path, how: str = "", at: float = 0.0, plot: bool = True) -> Ended:
    """Runs ``fusebert WORDS`` in a new session.

    Args:
        place: a folder for the output.
        how: what happens. "event": SIGKILL before the file event number ``at`` (a file opened for writing, renamed or
            removed, a folder made). "time": SIGKILL after ``at`` seconds. "write": SIGXFSZ kills the process when a
            file grows beyond 1,000 bytes after file event number ``at``: in the middle of a write. "full": from file
            event number ``at`` on, no file can grow. Name of a signal: sent to all processes after ``at`` seconds.
            "": nothing.
        plot: whether matplotlib is installed.
    """
    output, count = place / "output", place / "events"
    count.unlink(missing_ok=True)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    reader, writer = os.pipe()  # a pipe can be written to when files cannot
    process = os.fork()
    if process == 0:
        os.close(reader)
        _child(words, writer, count, how, at, plot)
    os.close(writer)
    os.set_blocking(reader, False)
    started, text, found, status = time.monotonic(), b"", 0, 0
    number = signal.SIGKILL if how == "time" else getattr(signal, how, None)
    while not found and time.monotonic() < started + SECONDS:
        if number is not None and time.monotonic() > started + at:
            _end(process, number)
            number = None
        time.sleep(0.002)
        found, status = os.waitpid(process, os.WNOHANG)
        text += _read(reader)
    if not found:
        _end(process, signal.SIGKILL)
        os.waitpid(process, 0)
    _end(process, signal.SIGKILL)  # the loader workers of a killed run
    text += _read(reader)
    os.close(reader)
    os.write(handle, text)
    os.close(handle)
    events = int(count.read_text()) if count.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status) if found else None, text.decode(errors="replace"), events)


def _read(reader: int) -> bytes:
    text = b""
    with contextlib.suppress(BlockingIOError):
        while block := os.read(reader, 1 << 16):
            text += block
    return text


def _end(process: int, number: int) -> None:
    """Sends a signal to the group of ``process``, which may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, number)


def _child(words: Sequence[str], output: int, count: Path, how: str, at: float, plot: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as fusebert.train.__main__ does
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    main, events = os.getpid(), 0
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or name in EVENTS) or os.getpid() != main:
            return
        events += 1
        if events == at and how == "event":
            os.killpg(0, signal.SIGKILL)
        if events == at and how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        if events == at and how == "write":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    status = 70
    try:
        from fusebert.train import cli

        if not plot:
            sys.modules["matplotlib"] = None  # type: ignore[assignment]
        sys.addaudithook(hook)
        sys.argv = ["fusebert", *words]
        cli.main()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import atexit

        sys.stdout.flush()
        sys.stderr.flush()
        if how == "":
            count.write_text(str(events))
        atexit._run_exitfuncs()
        os._exit(status)


def run_jobs(jobs: list[dict[str, Any]], place: Path) -> list[Ended]:
    """Runs each job, the arguments of `run` without ``place``, in a fork of a new process."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(place)], check=True, env=environment)
    return [Ended(**each) for each in json.loads((place / "results.json").read_text())]


def main() -> None:
    import_everything()
    place = Path(sys.argv[1])
    ended = [run(job["words"], place, job["how"], job["at"]) for job in json.loads((place / "jobs.json").read_text())]
    (place / "results.json").write_text(json.dumps([dataclasses.asdict(each) for each in ended]))


if __name__ == "__main__":
    main()
