"""A map over worker processes: results in order, few tasks in flight, so that memory stays bounded and the outcome
does not depend on how many workers there are."""

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
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """``function`` of each task, in the tasks' order; with one worker, in this process.

    ``tasks`` is read here, at most two tasks a worker ahead of the results. ``initializer`` runs once in each worker.

    Raises:
        UserError: a worker process died, which is nearly always for want of memory.
    """
    if workers == 1:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, tasks)
        return
    # Spawned, not forked: a fork copies locks that threads of this process (Rust's, the progress bar's) may hold.
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
            "a worker process died, most likely for want of memory: try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if initializer is not None:
        initializer(*initargs)


def end_with_parent() -> None:
    """From now on this worker process ends when its parent does. One that is killed outright would otherwise leave it
    waiting for tasks for ever, with whatever sockets it inherited."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


__all__ = ["available_cores", "end_with_parent", "ordered_map"]
