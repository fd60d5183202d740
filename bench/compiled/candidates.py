"""Other configurations of the kernels that have no table, which the prediction favours: ``bench tune --kernels rows``.

The first configuration of a race is the one that is launched today. A candidate is here because its predicted bound or
its sum is better at BERT's shapes. Those of one stage load nothing ahead of time: what that costs in latency the
prediction does not see, so none becomes the default before a GPU's clock says so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ...kernels import backend
from ...kernels.attn import launch as attention
from ...kernels.attn.config import Config as AttentionConfig
from ...kernels.attn.launch import NO_WINDOW, Problem, new_output, new_stats
from ...kernels.embedding import launch as embedding
from ...kernels.norm import launch as norm
from ...kernels.rows import Config
from ..measure.gpus import GPU, GPUS, named
from ..measure.machine import environment
from ..measure.memory import release_memory
from ..measure.prediction import KernelPrediction, RaceCase, RaceContestant
from ..measure.result import RaceResult, write_result
from ..measure.settings import TuneOptions
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave
from ..measure.verify import one_line
from ..operators.persistent_attention_kernels import Persistent
from ..operators.whole_backward_kernel import WholeBackward
from .aot import Launch, compiled_kernels
from .speed_of_light import predict

TOKENS, HEADS, HEAD_DIM, VOCAB = 65536, 12, 64, 30522
P = 0.1
SAMPLE = 2  # programs
SECONDS = 0.4  # of a configuration


@dataclasses.dataclass(frozen=True)
class Race:
    """A kernel at a shape, and how else it could be launched.

    Attributes:
        kernel: the name of the Triton function, or what the names of those begin with that are launched in sequence.
        call: launches it, with what it needs, on the device.
        per_step: launches in a step of the preset with this shape.
        owner, function: what gives the configuration, an attribute of a module or class.
        others: candidates: configurations, or other kernels, which install themselves.
    """

    kernel: str
    shape: str
    per_step: int
    call: Callable[[torch.device, torch.dtype], Callable[[], Any]]
    owner: Any
    function: str
    others: tuple[Any, ...]

    @contextlib.contextmanager
    def launched_as(self, config: Any) -> Iterator[None]:
        """Within the block the kernel is launched as ``config``; None: as always."""
        if config is None:
            context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        elif isinstance(config, (Persistent, WholeBackward)):
            context = config.installed()
        else:
            context = mock.patch.object(self.owner, self.function, return_value=config)
        with context:
            yield


def _empty(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On a GPU filled, because zeros and NaN can be faster than data; on a CPU never touched."""
    x = torch.empty(*shape, dtype=dtype, device=device)
    return x.normal_() if device.type == "cuda" else x


def _attention(seqlen: int, backward: bool) -> Callable[[torch.device, torch.dtype], Callable[[], Any]]:
    def call(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
        q, k, v, dout = (_empty(device, TOKENS, HEADS, HEAD_DIM, dtype=dtype) for _ in range(4))
        bounds = torch.arange(0, TOKENS + 1, seqlen, dtype=torch.int32, device=device)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        problem = Problem(q, k, v, bounds, bounds, None, seed, seqlen, seqlen, HEAD_DIM**-0.5, P, NO_WINDOW)
        out, stats = new_output(q), new_stats(q)
        if not backward:
            return lambda: attention.launch_forward(problem, out, stats)
        gradients = new_output(q), new_output(k), new_output(v)
        return lambda: attention.launch_backward(problem, out, stats, dout, *gradients)

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
        positions = torch.arange(TOKENS, device=device) % 128
        tables = [_empty(device, rows, hidden) for rows in (VOCAB, 2, 512)]
        vectors = [_empty(device, hidden) for _ in range(2)]
        dy, mean, rstd = _empty(device, TOKENS, hidden, dtype=dtype), _empty(device, TOKENS), _empty(device, TOKENS)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        arguments: list[Any] = [dy, words, positions % 2, positions, *tables, *vectors, mean, rstd, seed, P, 0]
        return lambda: embedding.launch_backward(*arguments, True, True, True, True, True)

    return call


def races() -> list[Race]:
    """At BERT's shapes: base and large, 65,536 tokens; of attention also shorter segments."""
    found = []
    for seqlen, forward, backward in (
        (16, [_short(16, 4)], [_short(16, 4)]),
        (32, [_short(32, 2), _short(32, 4), _persistent("forward", 1, 8)], [_short(32, 2), _short(32, 4)]),
        (64, [_persistent("forward", 4, 2)], [_persistent("backward", 4, 2)]),
        # The backward's sum is worse (368 bytes spill), but it has two resident blocks, which the prediction ignores.
        (
            128,
            [_short(128, 4), _persistent("forward", 8, 1)],
            [_short(128, 8, maxnreg=128), _persistent("backward", 8, 1)],
        ),
    ):
        for name, others in (("forward", forward), ("backward", backward)):
            call = _attention(seqlen, name == "backward")
            shape = f"N={seqlen} D={HEAD_DIM}"
            found.append(Race(f"attn_short_{name}", shape, 12, call, Problem, "short_config", tuple(others)))
    long = _attention(256, True)
    found.append(Race("attn_long_backward", "N=256 D=64", 12, long, Problem, "long_config", (WholeBackward(64, 8),)))
    for hidden, layers in ((768, 12), (1024, 24)):
        shape = f"H={hidden}"
        ahead = Config(4, 1024, 2), Config(2, 1024, 1)
        found.append(
            Race("layernorm_forward", shape, 2 * layers, _layernorm(hidden, False), norm, "forward_config", ahead)
        )
        direct = Config(2, 1024, 8), Config(2, 1024, 4), Config(1, 1024, 4), Config(1, 1024, 2)
        found.append(
            Race("layernorm_backward", shape, 2 * layers, _layernorm(hidden, True), norm, "backward_config", direct)
        )
        found.append(
            Race("embed_layernorm_backward", shape, 1, _embedding(hidden), embedding, "backward_config", direct)
        )
    return found


def _short(seqlen: int, num_warps: int, maxnreg: int | None = None) -> AttentionConfig:
    return AttentionConfig(seqlen, seqlen, num_warps, 1, maxnreg)


def _persistent(name: str, num_warps: int, blocks: int) -> Persistent:
    return Persistent(f"attn_short_{name}", num_warps, 2, blocks)


def predicted(race: Race, config: Any, gpu: GPU, dtype: torch.dtype) -> KernelPrediction:
    """The kernel, launched as ``config``; where several have the race's name and more, all of them, in sequence."""
    launches: list[Launch] = []
    with compiled_kernels(gpu.arch, launches.append, gpu.multiprocessors), race.launched_as(config):
        race.call(torch.device("cpu"), dtype)()
    name = config.name if isinstance(config, (Persistent, WholeBackward)) else race.kernel
    found = [each for each in launches if each.resources.name.startswith(name)]
    return in_sequence(race.kernel, [predict(each, gpu, call=race.shape, sample=SAMPLE) for each in found])


def in_sequence(kernel: str, rows: list[KernelPrediction]) -> KernelPrediction:
    """One row of several kernels: times and counts add up, resources are those of the kernel with the most."""
    if len(rows) == 1:
        return rows[0]
    return dataclasses.replace(
        max(rows, key=lambda row: row.registers),
        kernel=kernel,
        spill_bytes=max(row.spill_bytes for row in rows),
        blocks=min(row.blocks for row in rows),
        programs=sum(row.programs for row in rows),
        waves=sum(row.waves for row in rows),
        issue_slots=sum(row.issue_slots for row in rows),
        flops=sum(row.flops for row in rows),
        hbm_bytes=sum(row.hbm_bytes for row in rows),
        us={name: sum(row.us[name] for row in rows) for name in rows[0].us},
        roofline_us=sum(row.roofline_us for row in rows),
        refused=next((row.refused for row in rows if row.refused), None),
    )


def _numbered(numbers: tuple[int, int], gpu: GPU, dtype: torch.dtype) -> KernelPrediction:
    """`predicted` of a race and a configuration by their numbers; runs in a process of the pool."""
    race = races()[numbers[0]]
    return predicted(race, (None, *race.others)[numbers[1]], gpu, dtype)


def predictions(gpu: GPU, dtype: torch.dtype) -> Iterator[KernelPrediction]:
    """Of all configurations of all races, in their order. Compiling takes seconds each: a process a core."""
    numbers = [(i, j) for i, race in enumerate(races()) for j in range(1 + len(race.others))]
    spawn = multiprocessing.get_context("spawn")  # Triton does not work in a forked process
    with concurrent.futures.ProcessPoolExecutor(
        min(len(numbers), len(os.sched_getaffinity(0))), mp_context=spawn
    ) as pool:
        yield from pool.map(functools.partial(_numbered, gpu=gpu, dtype=dtype), numbers)


def _words(config: Any) -> str:
    if config is None:
        return "launched"
    if isinstance(config, Persistent):
        return f"persistent warps={config.num_warps} stages={config.num_stages}"
    if isinstance(config, WholeBackward):
        return f"one kernel N={config.block_n} warps={config.num_warps}"
    stages = config.num_stages if isinstance(config, AttentionConfig) else config.stages
    tile = f"M={config[0]} {'N' if isinstance(config, AttentionConfig) else 'H'}={config[1]}"
    limit = f" maxnreg={config.maxnreg}" if getattr(config, "maxnreg", None) else ""
    return f"{tile} warps={config.num_warps} stages={stages}{limit}"


def cases(gpu: GPU, dtype: torch.dtype) -> list[tuple[Race, RaceCase]]:
    """The races with their predictions, the largest expected gain of a step first."""
    found = predictions(gpu, dtype)
    pairs = []
    for race in races():
        rows = tuple(RaceContestant(_words(config), next(found)) for config in (None, *race.others))
        pairs.append((race, RaceCase(race.kernel, race.shape, race.per_step, rows)))
    return sorted(pairs, key=lambda pair: -pair[1].expected_gain_us)


def gpu_here(arch: int) -> torch.device | None:
    """The GPU to measure on; None where there is none of this architecture."""
    return torch.device("cuda") if torch.cuda.is_available() and backend.architecture() == arch else None


def _timed(race: Race, case: RaceCase, dtype: torch.dtype, device: torch.device) -> RaceCase:
    """``case`` with the time of each configuration; they take turns."""
    call = race.call(device, dtype)
    configs = dict(zip((row.config for row in case.contestants), (None, *race.others), strict=True))
    works: dict[str, Work] = {}
    failed: dict[str, str] = {}
    for words, config in configs.items():

        def context(config: Any = config) -> contextlib.AbstractContextManager[None]:
            return race.launched_as(config)

        try:
            with context():
                call()  # compiles
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            works[words] = Work(lambda _: call(), context=context)
        except Exception as error:  # a candidate may not fit; the others are still timed
            failed[words] = one_line(error)
    timings = interleave(works, device, seconds=SECONDS * len(works), device_time=True) if works else {}
    launched = timings.get(_words(None))
    rows = []
    for row in case.contestants:
        timing = timings.get(row.config)
        times = None if timing is None or launched is None else ratio(timing.samples_ms, launched.samples_ms)
        rows.append(dataclasses.replace(row, timing=timing, ratio_to_launched=times, failed=failed.get(row.config)))
    return dataclasses.replace(case, contestants=tuple(rows))


def race(options: TuneOptions, arch: int, dtype: torch.dtype, show: Callable[[Any], None]) -> RaceResult:
    """Predict all configurations and, on that GPU, time them, race by race; show and return (and write) the result.

    Args:
        options: ``minutes``: no race begins after it. ``out``: written after every race.
        show: takes each record as it is made.
    """
    begin = time.monotonic()
    device = gpu_here(arch)
    key = named(torch.cuda.get_device_name(device)) if device and device.type == "cuda" else None
    gpu = GPUS[key] if key else next(gpu for gpu in GPUS.values() if gpu.arch == arch)
    where = environment(device or torch.device("cpu"))
    show(where)
    result = RaceResult(where, gpu.name, str(dtype).removeprefix("torch."), TOKENS)
    for each, case in cases(gpu, dtype):
        if device and options.minutes is not None and time.monotonic() - begin > 60 * options.minutes:
            result.left_out.append(f"{each.kernel} {each.shape}")
            continue
        result.races.append(_timed(each, case, dtype, device) if device else case)
        if device:
            release_memory(device)
        show(result.races[-1])
        if options.out is not None:
            write_result(options.out, result)
    result.seconds = time.monotonic() - begin
    if options.out is not None:
        write_result(options.out, result)
    return result
