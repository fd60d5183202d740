"""Worker processes, and an ordered map over them."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ..errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def follow_parent(*ignored: signal.Signals) -> None:
    """Makes this worker process ignore some signals, and exit when its parent exits.

    Call it once, when the process starts. Without it a worker of a killed parent waits for tasks for ever and keeps the
    sockets that it inherited.

    Args:
        ignored: signals that reach the whole process group and that the parent handles, such as SIGINT (Ctrl-C).
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """``function`` of each task, in the order of the tasks, so the results do not depend on the number of workers.

    Args:
        function: must be importable by name, as for `multiprocessing`.
        tasks: read in this process, at most two tasks per worker ahead of the results, so memory stays bounded.
        workers: processes; 1 runs everything in this process.
        initializer, initargs: called once in each worker.

    Raises:
        UserError: a worker process died.
    """
    if workers == 1:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, tasks)
        return
    # Spawn, because a fork copies locks that threads of this process (Rust's, the progress bar's) may hold.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(initializer, initargs)
    )
    in_flight: collections.deque[Future[Result]] = collections.deque()
    try:
        for task in tasks:
            in_flight.append(pool.submit(function, task))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most likely because memory ran out: try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    follow_parent(signal.SIGINT)  # not SIGTERM: ProcessPoolExecutor ends workers with it
    if initializer is not None:
        initializer(*initargs)
