"""``fusebert bench predict --op``: an operator at your shapes on a GPU that need not be here, from the compiled code.

Our contestant of `fusebert bench kernels` runs dry (see `steps.dry_run`), forward and backward; its launches are
predicted as those of a step are. The floor beside them is the operator's least work at the GPU's rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...train.errors import UserError
from ..measure.case import OURS, Cost
from ..measure.gpus import GPU, GPUS
from ..measure.prediction import KernelPrediction, OtherCall, PassPrediction
from ..measure.result import OperatorPredictResult, write_result
from ..measure.settings import DTYPES, PredictOperatorSettings, PredictOptions, PredictSettings
from ..measure.shapes import Shape, parse
from ..steps.dry_run import dry
from ..steps.predict import Kernels, about, check_options, others_of
from .build import Operator
from .run import OPERATORS

ON_GPU = torch.device("cuda")  # the shapes' defaults are a GPU's


def _shapes(operator: Operator, shapes: str | None) -> list[Shape]:
    keys = operator.keys(ON_GPU)
    if shapes is None:
        return [{name: key.default for name, key in keys.items()}]
    try:
        return parse(shapes, keys)
    except ValueError as error:
        raise UserError(f"--shapes: {error}") from error


def passes_of(
    operator: Operator, shape: Shape, dtype: torch.dtype, gpu: GPU, show: Callable[[Any], None]
) -> Iterator[PassPrediction]:
    """The prediction of the forward and of the backward, or of both in one where the forward computes gradients.

    Raises:
        ValueError: the shape is impossible.
    """
    setting = operator.setting(shape, torch.device("cpu"), dtype, quick=True)
    case = operator.case(setting)
    ours = next(contestant for contestant in case.contestants if contestant.role == OURS)
    ragged = shape.get("lengths", "equal") != "equal"
    name = ",".join(f"{key}={value}" for key, value in shape.items())
    kernels = {which: Kernels(gpu, ragged, show) for which in ("forward", "backward")}
    others = {}
    with dry(gpu, lambda *launch: kernels[which].observe(*launch)) as mode:
        run = ours.bind(case.inputs(0), case.dropout_p)
        mode.counting = True
        for which in kernels:
            mode.calls = {}
            if which == "forward":
                out = run.forward()
            else:
                run.backward(out)
            others[which] = others_of(mode.calls, gpu)
    forward, backward = operator.cost(setting)
    if {"forward", "backward"}.isdisjoint(operator.passes):  # the forward already computes gradients
        both = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
        rows = [row for each in kernels.values() for row in each.rows()]
        yield _pass(name, "forward+backward", rows, [row for each in others.values() for row in each], both, gpu)
        return
    for which, cost in (("forward", forward), ("backward", backward)):
        yield _pass(name, which, kernels[which].rows(), others[which], cost, gpu)


def _pass(
    case: str, which: str, kernels: list[KernelPrediction], others: list[OtherCall], cost: Cost, gpu: GPU
) -> PassPrediction:
    by_flops, by_bytes = cost.flops / gpu.matmul_flops_per_s, cost.bytes / gpu.copy_bytes_per_s
    limit = "matmul" if by_flops > by_bytes else "memory"
    return PassPrediction(case, which, kernels, others, 1e6 * max(by_flops, by_bytes), limit)


def run(options: PredictOptions, *, show: Callable[[Any], None] = print) -> OperatorPredictResult:
    """Predict, show what was found, and return (and write) the result.

    Args:
        options: ``op``, ``shapes``, ``gpu`` and ``dtype``. The others are a step's, and must have their defaults.
        show: takes a line for each kernel, then the result.

    Raises:
        UserError: there is no such operator, GPU or dtype, a shape is not allowed, or an option is a step's.
    """
    operator = OPERATORS.get(options.op or "")
    if operator is None:
        raise UserError(f"--op {options.op}: choose one of {', '.join(OPERATORS)}")
    for field in dataclasses.fields(PredictSettings):
        if field.name not in ("gpu", "dtype") and getattr(options, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise UserError(f"--{flag} is a step's: with --op give sizes in --shapes, as --help lists them")
    shapes = _shapes(operator, options.shapes)
    check_options(options)
    gpu, dtype = GPUS[options.gpu], getattr(torch, DTYPES[options.dtype])
    try:
        passes = [each for shape in shapes for each in passes_of(operator, shape, dtype, gpu, show)]
    except ValueError as error:
        raise UserError(f"--shapes: {error}") from error
    text = "; ".join(",".join(f"{key}={value}" for key, value in shape.items()) for shape in shapes)
    settings = PredictOperatorSettings(gpu=options.gpu, op=operator.name, shapes=text, dtype=options.dtype)
    result = OperatorPredictResult(about(gpu), settings, passes)
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result
