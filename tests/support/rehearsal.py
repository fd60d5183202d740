"""``python rehearsal.py calibrate|tune ...``: the command as on an H100, which need not be here.

Real are the command line, the dry step, the compiler and the prediction, the arguments of each launch, and the result
file. Stand-ins: the clock, the machine's rates and the GPU: a launch is compared with the kernel's parameters and does
nothing. Of the races only two take part, at a small size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fusebert.bench import cli
from fusebert.bench.compiled import candidates
from fusebert.bench.measure.ceilings import Ceilings
from fusebert.bench.measure.gpus import GPU
from fusebert.bench.measure.statistics import Timing
from fusebert.bench.steps import calibrate
from fusebert.kernels import rows
from fusebert.kernels.backend import triton

compile_or_launch = triton.runtime.JITFunction.run
launches: list[str] = []


def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """In place of a launch: every parameter is there, and no other; tensors are where the GPU would look for them."""
    if warmup:
        return compile_or_launch(self, *args, grid=grid, warmup=True, **kwargs)
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    options = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}
    assert given.keys() - options == set(self.arg_names), (self.fn.__name__, given.keys() ^ set(self.arg_names))
    assert all(isinstance(n, int) and n > 0 for n in (grid(given) if callable(grid) else grid))
    launches.append(self.fn.__name__)
    return None


def interleave(works: Any, device: torch.device, **options: Any) -> dict[str, Timing]:
    for work in works.values():
        for i in range(2):
            state = work.prepare(i)
            with work.context():
                work.run(state)
    return {name: Timing.of([0.01 + 0.001 * i for i in range(7)], [0.001] * 7, 3) for name in works}


def predicted_here(gpu: GPU, dtype: torch.dtype) -> Iterator[Any]:
    for race in candidates.races():
        for config in (None, *race.others):
            yield candidates.predicted(race, config, gpu, dtype)


all_races = candidates.races
few_races = [race for race in all_races() if race.kernel in ("attn_short_forward", "layernorm_forward")][:2]
with (
    mock.patch.object(triton.runtime.JITFunction, "run", run),
    mock.patch.object(rows, "multiprocessors", return_value=132),
    mock.patch.object(calibrate, "rates_of", return_value="h100"),
    mock.patch.object(calibrate, "l2_bytes", return_value=1 << 10),
    mock.patch.object(calibrate, "measure_ceilings", return_value=Ceilings(3e12, 8e14, "bfloat16")),
    mock.patch.object(calibrate, "interleave", interleave),
    mock.patch.object(candidates, "TOKENS", 4224),
    mock.patch.object(candidates, "races", return_value=few_races),
    mock.patch.object(candidates, "predictions", predicted_here),
    mock.patch.object(candidates, "gpu_here", return_value=torch.device("cpu")),
    mock.patch.object(candidates, "interleave", interleave),
):
    try:
        cli.main(sys.argv[1:])
    finally:
        print("launched:", *sorted(set(launches)))
