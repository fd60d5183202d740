"""An ordered map over the workers of a Dask cluster, as `workers.ordered_map` is over processes of this machine."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import tokenizers

from ..errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_SECONDS = 30
_lock = threading.Lock()
_started: tuple[Any, ...] | None = None  # of this worker process: the initargs that it is prepared for


def cluster_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    address: str,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
) -> Generator[Result, None, None]:
    """``function`` of each task, in the order of the tasks. The tasks of a worker that dies run again on another.

    Args:
        function: must be importable by name on the workers.
        tasks: read in this process, at most two for each thread of the cluster ahead of the results.
        address: of the Dask scheduler, such as "tcp://host:8786".
        initializer, initargs: called once in each worker process. A path must lead to the same file there.

    Raises:
        UserError: the cluster cannot be reached, its workers have another version of the tokenizers, cannot see a file,
            or died several times of one task.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise UserError("--executor dask needs a package: pip install 'fusebert[dask]'") from error
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--executor dask:{address}: no scheduler answers there ({reason})") from error
    with client:
        _check_versions(client, address)
        in_flight: collections.deque[Any] = collections.deque()
        most = 2 * sum(client.nthreads().values())
        try:
            for task in tasks:
                in_flight.append(client.submit(_run, function, task, initializer, initargs, pure=False))
                if len(in_flight) > most:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except KilledWorker as error:
            raise UserError(
                "workers of the cluster died again and again of one piece of text, most likely because memory ran out: "
                "give them more, or fewer threads"
            ) from error
        except FileNotFoundError as error:
            raise UserError(
                f"the workers of the cluster do not see {error.filename}: --out must be in a folder that they share"
            ) from error
        finally:
            client.cancel(list(in_flight), force=True)


def _check_versions(client: Any, address: str) -> None:
    """Raises UserError unless there are workers, and all encode alike."""
    found: dict[str, str] = client.run(_version)
    if not found:
        raise UserError(f"--executor dask:{address}: the cluster has no workers")
    other = {worker: version for worker, version in found.items() if version != tokenizers.__version__}
    if other:
        worker, version = next(iter(other.items()))
        raise UserError(
            f"the worker {worker} has tokenizers {version}, this machine {tokenizers.__version__}: install the same, "
            "so that all encode alike"
        )


def _version() -> str:
    return str(tokenizers.__version__)


def _run(
    function: Callable[[Task], Result], task: Task, initializer: Callable[..., None], initargs: tuple[Any, ...]
) -> Result:
    global _started
    with _lock:  # a worker may have several threads
        if _started != initargs:
            if not initargs[0].is_file():
                raise FileNotFoundError(2, "No such file", str(initargs[0]))
            initializer(*initargs)
            _started = initargs
    return function(task)
