"""Other configurations of the kernels that have no table, which the prediction favours: ``bench tune --kernels rows``.

The first configuration of a race is the one that is launched today. A candidate is here because its predicted bound or
its sum is better at BERT's shapes. Those of one stage load nothing ahead of time: what that costs in latency the
prediction does not see, so none becomes the default before a GPU's clock says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ...kernels import backend, use_backend
from ...kernels.attn.config import Config as AttentionConfig
from ...kernels.attn.launch import NO_WINDOW, Problem, launch_backward, launch_forward, new_output, new_stats
from ...kernels.backend import triton
from ...kernels.embedding import launch as embedding
from ...kernels.norm import launch as norm
from ...kernels.rows import Config
from ..measure.gpus import GPUS
from ..measure.prediction import KernelPrediction
from .aot import Launch, compiled_kernels
from .speed_of_light import predict

TOKENS, HEADS, HEAD_DIM, SEQLEN, VOCAB = 65536, 12, 64, 128, 30522
P = 0.1
SAMPLE = 2  # programs


@dataclasses.dataclass(frozen=True)
class Race:
    """A kernel at a shape, and how else it could be launched.

    Attributes:
        kernel: the name of the Triton function.
        call: launches it, with what it needs, on the device.
        owner, function: what gives the configuration: an attribute of a module or class.
        others: candidates.
    """

    kernel: str
    shape: str
    call: Callable[[torch.device, torch.dtype], Callable[[], Any]]
    owner: Any
    function: str
    others: tuple[Any, ...]

    @contextlib.contextmanager
    def launched_as(self, config: Any) -> Iterator[None]:
        """Within the block the kernel is launched as ``config``; None: as always."""
        patch = mock.patch.object(self.owner, self.function, return_value=config)
        with contextlib.nullcontext() if config is None else patch:
            yield


def _empty(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On a GPU filled, because zeros and NaN can be faster than data; on a CPU never touched."""
    x = torch.empty(*shape, dtype=dtype, device=device)
    return x.normal_() if device.type == "cuda" else x


def _attention(backward: bool) -> Callable[[torch.device, torch.dtype], Callable[[], Any]]:
    def call(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
        q, k, v, dout = (_empty(device, TOKENS, HEADS, HEAD_DIM, dtype=dtype) for _ in range(4))
        bounds = torch.arange(0, TOKENS + 1, SEQLEN, dtype=torch.int32, device=device)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        problem = Problem(q, k, v, bounds, bounds, None, seed, SEQLEN, SEQLEN, HEAD_DIM**-0.5, P, NO_WINDOW)
        out, stats = new_output(q), new_stats(q)
        if not backward:
            return lambda: launch_forward(problem, out, stats)
        gradients = new_output(q), new_output(k), new_output(v)
        return lambda: launch_backward(problem, out, stats, dout, *gradients)

    return call


def _layernorm(hidden: int, backward: bool) -> Callable[[torch.device, torch.dtype], Callable[[], Any]]:
    def call(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
        x, y = (_empty(device, TOKENS, hidden, dtype=dtype) for _ in range(2))
        weight, bias, linear = (_empty(device, hidden) for _ in range(3))
        mean, rstd = (_empty(device, TOKENS) for _ in range(2))
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        if not backward:
            return lambda: norm.launch_forward(x, linear, y, weight, bias, seed, P, 1e-12, True, True)
        wanted = (True, True, True, True, True)
        return lambda: norm.launch_backward(y, None, x, linear, weight, bias, mean, rstd, seed, P, *wanted)

    return call


def _embedding(hidden: int) -> Callable[[torch.device, torch.dtype], Callable[[], Any]]:
    def call(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
        words = torch.randint(0, VOCAB, (TOKENS,), device=device)
        positions = torch.arange(TOKENS, device=device) % SEQLEN
        tables = [_empty(device, rows, hidden) for rows in (VOCAB, 2, 512)]
        vectors = [_empty(device, hidden) for _ in range(2)]
        dy, mean, rstd = _empty(device, TOKENS, hidden, dtype=dtype), _empty(device, TOKENS), _empty(device, TOKENS)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        arguments: list[Any] = [dy, words, positions % 2, positions, *tables, *vectors, mean, rstd, seed, P, 0]
        return lambda: embedding.launch_backward(*arguments, True, True, True, True, True)

    return call


def races() -> list[Race]:
    """At BERT's shapes: base and large, 65,536 tokens, segments of 128."""
    short = f"N={SEQLEN} D={HEAD_DIM}"
    found = [
        Race("attn_short_forward", short, _attention(False), Problem, "short_config", (_short(4),)),
        # The sum is worse (368 bytes spill), but two blocks are resident, which the prediction does not value.
        Race("attn_short_backward", short, _attention(True), Problem, "short_config", (_short(8, maxnreg=128),)),
    ]
    for hidden in (768, 1024):
        shape = f"H={hidden}"
        ahead = Config(4, 1024, 2), Config(2, 1024, 1)
        found.append(Race("layernorm_forward", shape, _layernorm(hidden, False), norm, "forward_config", ahead))
        direct = Config(2, 1024, 8), Config(2, 1024, 4), Config(1, 1024, 4), Config(1, 1024, 2)
        found.append(Race("layernorm_backward", shape, _layernorm(hidden, True), norm, "backward_config", direct))
        found.append(Race("embed_layernorm_backward", shape, _embedding(hidden), embedding, "backward_config", direct))
    return found


def _short(num_warps: int, maxnreg: int | None = None) -> AttentionConfig:
    return AttentionConfig(SEQLEN, SEQLEN, num_warps, 1, maxnreg)


def predicted(race: Race, config: Any, arch: int, dtype: torch.dtype) -> KernelPrediction:
    """The kernel, launched as ``config``, on the first GPU of that architecture in `GPUS`."""
    gpu = next(gpu for gpu in GPUS.values() if gpu.arch == arch)
    launches: list[Launch] = []
    with compiled_kernels(arch, launches.append, gpu.multiprocessors), race.launched_as(config):
        race.call(torch.device("cpu"), dtype)()
    launch = next(each for each in launches if each.resources.name == race.kernel)
    return predict(launch, gpu, call=race.shape, sample=SAMPLE)


def _milliseconds(race: Race, config: Any, dtype: torch.dtype) -> float:
    call = race.call(torch.device("cuda"), dtype)
    with use_backend("triton"), race.launched_as(config):
        return float(triton.testing.do_bench(call, return_mode="median"))


def race(arch: int, dtype: torch.dtype, report: Callable[[str], None]) -> None:
    """A line for each configuration: resources, predicted times, and on that GPU the time of the launcher.

    Args:
        report: takes the lines.
    """
    timed = torch.cuda.is_available() and backend.architecture() == arch
    name = next(gpu.name for gpu in GPUS.values() if gpu.arch == arch)
    report(f"predicted for {name}, {TOKENS:,} tokens: µs if all overlaps, µs if nothing does")
    for each in races():
        for config in (None, *each.others):
            row = predicted(each, config, arch, dtype)
            words = "launched" if config is None else f"{row.tile} warps={row.warps} stages={config_stages(config)}"
            times = row.refused or f"{row.bound_us:7.1f} ({row.limiter}) {row.sum_us:7.1f}"
            measured = f" {_milliseconds(each, config, dtype):.4f} ms" if timed else ""
            spills = f", spills {row.spill_bytes} bytes" if row.spill_bytes else ""
            report(f"{each.kernel} {each.shape} {words}: {times}, {row.blocks} blocks{spills}{measured}")


def config_stages(config: Any) -> int:
    """The stages of a configuration of either kind."""
    return int(config.num_stages if isinstance(config, AttentionConfig) else config.stages)
