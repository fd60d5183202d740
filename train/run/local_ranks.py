"""Training processes on the cores of one machine, which ``fusebert pretrain`` starts itself.

The small operators of a small model lose more to the barriers between OpenMP's threads than they gain from them;
processes of one thread each meet only to add their gradients. The parent process forks them after its imports, so that
the start costs no second import, keeps the store in which they find each other, and passes signals on. It gives them
torchrun's environment variables, so that everything else works as under torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from .signals import LOCAL_RUN_ID, SIGNALS, armed_flag, exit_status

GRACE_S = 30.0  # for the others to end after the first process has
PR_SET_PDEATHSIG = 1


def start_ranks(count: int, work: Callable[[], None]) -> int:
    """Runs ``work`` in ``count`` forked processes. This one must have computed nothing yet, so that it has no threads.

    SIGINT, SIGTERM and SIGUSR1 go to rank 0, which agrees with the others; a second signal ends all of them at once.
    None of them survives the parent.

    Args:
        work: ends with SystemExit if it fails.

    Returns:
        The exit status of the job, when all have ended.
    """
    import torch.distributed as dist

    armed_flag[0] = 0
    listener = socket.create_server(("127.0.0.1", 0), backlog=count)
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until each side has its handlers
    children: list[int] = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _become(rank, count, listener.getsockname()[1], parent)
            listener.close()
            _work(work)
        children.append(child)
    # Not before the forks, because the store has threads.
    store = dist.TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    try:
        return _Parent(children).wait()
    finally:
        del store


def _become(rank: int, count: int, port: int, parent: int) -> None:
    """Makes this new process rank ``rank``. It is in a session of its own: a terminal's Ctrl-C reaches the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    os.environ |= {
        "TORCHELASTIC_RUN_ID": LOCAL_RUN_ID,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count)),
    }
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _work(work: Callable[[], None]) -> NoReturn:
    """Ends this process with the status of ``work``, and never returns to what the parent was called from."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(status)


class _Parent:
    """Waits for ``children``, rank 0 first, and passes signals on."""

    def __init__(self, children: list[int]) -> None:
        self._children = children
        self._running = set(children)
        self._received: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def wait(self) -> int:
        """The exit status: of rank 0 after a signal, otherwise of the first process that failed, or 0."""
        ended: dict[int, int] = {}  # in the order in which they end
        first_end = 0.0
        while self._running:
            for child in list(self._running):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    self._running.remove(child)
                    code = os.waitstatus_to_exitcode(status)
                    ended[child] = code if code >= 0 else 128 - code
                    first_end = first_end or time.monotonic()
            if first_end and time.monotonic() > first_end + GRACE_S:
                self._kill()
            time.sleep(0.02)
        if self._received is not None:
            return ended[self._children[0]]
        return next((status for status in ended.values() if status), 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._received = self._received is None, number
        if first and armed_flag[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._children[0], number)
            return
        self._kill()
        if first:
            os.write(2, b"\nfusebert: stopped before the first step: there is nothing to save\n")
            os._exit(exit_status(number == signal.SIGINT))
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _kill(self) -> None:
        for child in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
