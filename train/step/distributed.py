"""The processes of a torchrun job: ranks, sums over the hosts, and which process reports an error.

Every process runs the same program on its own device. The processes agree on a few numbers a step (counts, the clock,
whether to stop), summed over gloo between the hosts; no device waits for that as long as its host is ahead. Weights and
gradients are exchanged by PyTorch (see `sharding`), over NCCL between GPUs and over gloo between CPUs.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")
STORE_TIMEOUT = datetime.timedelta(seconds=10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The position of this process among the processes that train together. By default it is the only one.

    All processes must call the same methods in the same order. A single process communicates nothing.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        local_rank: index of this process on its machine.
        local_world_size: number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Reads torchrun's environment variables; a single process if torchrun did not launch this one."""
        if not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    def join(self, device: torch.device) -> None:
        """Initialises the process group: gloo for CPU tensors, and NCCL if ``device`` is a GPU."""
        if self.alone:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")

    def leave(self) -> None:
        """Waits for all processes and destroys the process group. After an error it could wait forever."""
        if not self.alone:
            self.sum([])
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes in float64, exact for counts below 2⁵³."""
        if self.alone:
            return list(values)
        total = torch.tensor([*values, 0.0], dtype=torch.float64)
        dist.all_reduce(total)
        return total[:-1].tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """Calls ``make`` on rank 0 only and returns its result in every process."""
        if self.alone:
            return make()
        made: list[T | None] = [make() if self.first else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]


def first_to_fail() -> bool:
    """Whether this failed process is the first of the job to fail, and so should print its error.

    The other processes fail as a consequence or for the same reason. A single process is always the first.
    """
    ranks = Ranks.from_environment()
    if ranks.alone:
        return True
    # torchrun sends SIGTERM to all processes when one exits. Ignore it so that this process can still print its error.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT
        )
        return int(store.add(f"fusebert/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    except (RuntimeError, KeyError):  # the store's machine is gone: rather print the error twice than not at all
        return True


def lost_connection(error: Exception) -> bool:
    """Whether ``error`` means that the connection to another process of the job is lost."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class LostPeer(UserError):
    """Another process of the job has ended. The message is one line."""

    def __init__(self) -> None:
        super().__init__(
            "another process of the job has ended without an error message, perhaps killed or out of memory; the job "
            "cannot continue without it: start again with --resume"
        )
