"""A benchmark of an operator: a case, its inputs, and the contestants that compute it.

A `Case` is an operator at one shape and dtype. It makes inputs, the correct result for them in float64 (`oracle`), and
plain PyTorch's result at the case's dtype (`yardstick`). A `Contestant` binds an implementation to such inputs, untimed
and in the layout that suits it best: a `Run`. The case's ``passes`` are timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .ceilings import Ceilings

Tensors = dict[str, Tensor]
OURS, PEER, BOUND = "ours", "peer", "bound"
COMPILE_IS_SLOW = "left out by --quick"  # why a compiled peer is missing


@dataclasses.dataclass(frozen=True)
class Run:
    """An implementation bound to one set of inputs.

    Attributes:
        forward: the call.
        leaves: the tensors that gradients are computed for.
        grad_output: the gradient of the result; None for a scalar loss.
        named: the result and the gradients of ``leaves`` under the case's names, in its canonical layout.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad_output: Tensor | None
    named: Callable[[Tensor, tuple[Tensor, ...]], Tensors]

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``leaves``, as new tensors: nothing is accumulated."""
        return torch.autograd.grad(out, self.leaves, self.grad_output)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The gradients of a whole pass, as in a training step."""
        return self.backward(self.forward())


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An implementation to be compared.

    Attributes:
        bind: canonical inputs and a dropout probability → a `Run`.
        role: "ours", "peer", or "bound": the part of the work that no implementation can omit, timed but not checked.
        replays_dropout: it draws `fusebert.kernels.dropout_mask`'s mask (or attention's) for the inputs' seed, so it is
            checked with dropout on. Others are checked with dropout off and timed with dropout on.
        context: entered around its calls, e.g. a forced backend.
    """

    name: str
    bind: Callable[[Tensors, float], Run]
    role: str = PEER
    replays_dropout: bool = False
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Missing:
    """A peer that does not take part, and the reason: how to install it, or what it cannot do."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Floor:
    """The time that no implementation of a pass can go below on this machine.

    Attributes:
        flops, bytes: the pass's `Cost`.
        floor_ms: max(FLOPs / matmul rate, bytes / copy rate), at the machine's measured rates.
        limit: the larger of the two: "matmul" or "memory".
    """

    flops: float
    bytes: float
    floor_ms: float
    limit: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least a pass must do: FLOPs of its matrix products; bytes, each input read and each output written once."""

    flops: float
    bytes: float

    def floor(self, ceilings: Ceilings) -> Floor:
        """The least time at the rates of ``ceilings``."""
        by_flops, by_bytes = self.flops / ceilings.matmul_flops_per_s, self.bytes / ceilings.copy_bytes_per_s
        limit = "matmul" if by_flops > by_bytes else "memory"
        return Floor(self.flops, self.bytes, 1e3 * max(by_flops, by_bytes), limit)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        op: its name in `kernels.OPERATORS`: "attention", "layernorm", …
        name: the shape in words, unique within the operator.
        shape: the shape in numbers, for the result file.
        inputs: seed → canonical inputs, random, on the device.
        oracle: (inputs, dropout probability) → result and gradients in float64, by name; dropout by the mask that
            ``replays_dropout`` contestants draw.
        yardstick: the same by plain PyTorch at the case's dtype.
        passes: pass → its cost. "forward" saves what the backward needs, "inference" has gradients switched off;
            "backward", "forward+backward".
        contestants: ours first.
        value: order of running when time is short; low first.
    """

    op: str
    name: str
    dtype: torch.dtype
    device: torch.device
    shape: Mapping[str, Any]
    inputs: Callable[[int], Tensors]
    oracle: Callable[[Tensors, float], Tensors]
    yardstick: Callable[[Tensors, float], Tensors]
    passes: Mapping[str, Cost]
    contestants: tuple[Contestant, ...]
    missing: tuple[Missing, ...] = ()
    dropout_p: float = 0.0
    value: int = 0


def with_peers(case: Case, names: Sequence[str]) -> Case:
    """The case with only the peers that `matches` one of ``names``; ours and bounds stay."""

    def wanted(name: str) -> bool:
        return any(matches(name, given) for given in names)

    return dataclasses.replace(
        case,
        contestants=tuple(c for c in case.contestants if c.role != PEER or wanted(c.name)),
        missing=tuple(gap for gap in case.missing if wanted(gap.name)),
    )


def matches(name: str, given: str) -> bool:
    """Whether ``given`` is the contestant's name or its first words ("sdpa": every SDPA backend)."""
    words, first = name.lower().replace(",", "").split(), given.lower().split()
    return bool(first) and words[: len(first)] == first


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def leaf(x: Tensor) -> Tensor:
    """``x`` as a leaf that requires a gradient, with the same memory and strides."""
    return x.detach().requires_grad_()
