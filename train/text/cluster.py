"""An ordered map over the workers of a Dask cluster, as `workers.ordered_map` is over processes of this machine."""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.metadata
import os
import socket
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_SECONDS = 30
_FIRST_TASKS = 8  # in flight at the start
_COUNT_SECONDS = 10  # between two looks at the number of workers, which may change
_PACKAGES = ("tokenizers", "blingfire", "regex")  # decide where sentences end and what their tokens are
_SOURCES = ("text", "corpus")  # folders of train/ that run on the workers


class Cluster:
    """The workers of a Dask cluster; use it as a context manager.

    Args:
        address: of the scheduler, such as "tcp://host:8786".
        folder: of this machine, which the workers must see.

    Raises:
        UserError: the cluster cannot be reached, its workers have other versions of fusebert or of what it encodes
            with, or do not see ``folder``.
    """

    def __init__(self, address: str, folder: Path) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise UserError("--executor dask needs a package: pip install 'fusebert[dask]'") from error
        try:
            self._client: Any = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--executor dask:{address}: no scheduler answers there ({reason})") from error
        self._versions = versions()
        try:
            self._check_workers(address, folder)
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """``function`` of each task, in the order of the tasks. The tasks of a worker that dies run again on another.

        Args:
            function: must be importable by name on the workers. Its errors are raised here.
            tasks: read in this process, at most two for each thread of the cluster ahead of the results; fewer at the
                start, so that later tasks can depend on the first results.

        Raises:
            UserError: workers died several times of one task, or the scheduler has gone.
        """
        from distributed import KilledWorker

        in_flight: collections.deque[Any] = collections.deque()
        done, counted, most = 0, float("-inf"), 0
        try:
            for task in tasks:
                in_flight.append(self._client.submit(_run, function, task, self._versions, pure=False))
                if time.monotonic() > counted + _COUNT_SECONDS:
                    most = 2 * sum(self._client.nthreads().values())
                    counted = time.monotonic()
                while len(in_flight) > min(most, max(_FIRST_TASKS, done)):
                    yield in_flight.popleft().result()
                    done += 1
            while in_flight:
                yield in_flight.popleft().result()
        except KilledWorker as error:
            raise UserError(
                "workers of the cluster died again and again of one part of the text, most likely because memory ran "
                "out: give them more, or fewer threads"
            ) from error
        except CancelledError as error:
            raise UserError("the Dask scheduler has gone: start again when the cluster is up") from error
        finally:
            if self._client.status == "running":
                self._client.cancel(list(in_flight), force=True)

    def _check_workers(self, address: str, folder: Path) -> None:
        try:
            found: dict[str, tuple[dict[str, str], bool]] = self._client.run(_look_around, str(folder))
        except Exception as error:  # Dask raises a plain Exception if a worker cannot import what is to run
            raise UserError(
                f"--executor dask:{address}: the workers have no fusebert, or another one ({error}): install the same "
                "everywhere"
            ) from error
        if not found:
            raise UserError(f"--executor dask:{address}: the cluster has no workers")
        for worker, (there, sees_folder) in found.items():
            _check_versions(worker, there, self._versions)
            if not sees_folder:
                raise UserError(
                    f"the worker {worker} does not see {folder}: --out must be in a folder that all workers share, "
                    "under the same path and with the rights of this user"
                )


def _check_versions(worker: str, there: dict[str, str], here: dict[str, str]) -> None:
    for name, version in here.items():
        if there.get(name) != version:
            raise UserError(
                f"the worker {worker} has {name} {there.get(name, 'of another version')}, and prepare runs with "
                f"{version}: install the same, so that all encode alike"
            )


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what decides how text is encoded. Of fusebert, also a hash of the sources, which tells two
    commits apart."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (root / folder).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    found = {"fusebert": f"{_version('fusebert')} (sources {digest.hexdigest()[:8]})"}
    return found | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _run(function: Callable[[Task], Result], task: Task, here: dict[str, str]) -> Result:
    _check_versions(socket.gethostname(), versions(), here)  # a worker may have joined after the start
    return function(task)


def _look_around(folder: str) -> tuple[dict[str, str], bool]:
    return versions(), os.access(folder, os.R_OK | os.X_OK)
