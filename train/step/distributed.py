"""The processes of a torchrun job: which one this is, what all of them counted, who tells the user of a failure.

Every process runs the same program on its own device. What they must agree on (counts, the clock, whether to stop) is
a few numbers a step, summed over gloo from host to host: no device waits for it as long as its host is ahead. What
moves weights and gradients is PyTorch's (see `sharding`), over NCCL between GPUs and over gloo between CPUs.
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
    """The processes that train together, seen from one of them; alone by default, and then nothing is communicated.

    Every process must make the same calls in the same order.

    Attributes:
        rank, world_size: this process among how many. local_rank, local_world_size: the same on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """What torchrun says; alone where it did not launch this process."""
        if not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world_size == 1

    def join(self, device: torch.device) -> None:
        """Meets the others: gloo for what is on the CPU, and NCCL where ``device`` is a GPU."""
        if self.alone:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")

    def leave(self) -> None:
        """Waits for the others, and ends the communication. Not after an error: the others may never come."""
        if not self.alone:
            self.sum([])
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64: exact for counts below 2⁵³."""
        if self.alone:
            return list(values)
        total = torch.tensor([*values, 0.0], dtype=torch.float64)
        dist.all_reduce(total)
        return total[:-1].tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, where alone it is called; the others wait for it."""
        if self.alone:
            return make()
        made: list[T | None] = [make() if self.first else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]


def first_to_fail() -> bool:
    """Whether this process, which failed, is the job's first: then it tells the user why. The others failed because it
    did, or for the same reason. A process that is alone is always the first."""
    ranks = Ranks.of_environment()
    if ranks.alone:
        return True
    # torchrun ends all of them as soon as one has exited: not the one that has yet to tell.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT
        )
        return int(store.add(f"fusebert/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    except (RuntimeError, KeyError):  # the store's machine is gone: better twice than not at all
        return True


def lost_connection(error: Exception) -> bool:
    """Whether it says that another process of the job does not answer any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class LostPeer(UserError):
    """Another process of the job has ended. The message is one line."""

    def __init__(self) -> None:
        super().__init__(
            "another process of the job has ended without a word (was it killed? is its memory full?), and none can go "
            "on without it: torchrun's summary names it; start again with --resume"
        )


__all__ = ["LostPeer", "Ranks", "first_to_fail", "lost_connection"]
