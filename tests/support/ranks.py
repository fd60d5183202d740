"""Pretraining runs in several processes, as torchrun starts them, but with one import of PyTorch for many runs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

Job = dict[str, Any]  # PretrainSettings' arguments


def pretrain_in(world_size: int, jobs: Sequence[Job], seconds: float = 900.0, setup: Any = None) -> None:
    """Runs the jobs one after the other, each in all of ``world_size`` processes; fails if one of them fails.

    Args:
        seconds: time limit for processes that hang. Generous, because a busy machine is ten times slower.
        setup: called with the rank in each process before the jobs.
    """
    # Open the stores here, as torchrun does in its agent. A port that is only looked up could be taken before its job,
    # because gloo's connections use the same range.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    ports = [store.port for store in stores]
    context = multiprocessing.get_context("forkserver")  # PyTorch is imported once in it, and computes nothing there
    context.set_forkserver_preload(["fusebert.train.run.pretrain", "ranks"])
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(rank, world_size, jobs, ports, setup, errors)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    running = list(processes)
    # If one fails, the others may wait for it forever.
    while running and errors.empty() and time.monotonic() < end:
        multiprocessing.connection.wait([process.sentinel for process in running], end - time.monotonic())
        running = [process for process in running if process.is_alive()]
    for process in running:
        process.kill()
        process.join()
    assert errors.empty(), errors.get()
    assert not running, f"{len(running)} of {world_size} processes did not end within {seconds} s"
    assert [process.exitcode for process in processes] == [0] * world_size


def _run(rank: int, world_size: int, jobs: Sequence[Job], ports: Sequence[int], setup: Any, errors: Any) -> None:
    from fusebert.train.run.pretrain import pretrain
    from fusebert.train.run.settings import PretrainSettings

    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
    }
    try:
        if setup is not None:
            setup(rank)
        for job, port in zip(jobs, ports, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            report = pretrain(PretrainSettings(**job), resume_command="RESUME")
            assert (report is not None) == (rank == 0)
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)


class SkewedClock:
    """Advances by one second a step on rank 0. On rank 1 it is an hour ahead and advances by three seconds."""

    def __init__(self, rank: int) -> None:
        self.now, self.rank = 0.0, rank

    def perf_counter(self) -> float:
        return self.now * (1 + 2 * self.rank) + 3600.0 * self.rank


def skew_clocks(rank: int) -> None:
    """A `setup` that gives each process's run a `SkewedClock`."""
    from fusebert.train.run import clock, setup
    from fusebert.train.step import stopwatch
    from fusebert.train.step.step import TrainingStep

    skewed, original = SkewedClock(rank), TrainingStep.__call__

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        skewed.now += 1.0
        return original(self, *args, **kwargs)

    clock.time = stopwatch.time = skewed  # type: ignore[assignment]
    setup.matmul_rate = lambda device, dtype: 1e12  # type: ignore[assignment]  # it measures time
    TrainingStep.__call__ = step  # type: ignore[method-assign]
