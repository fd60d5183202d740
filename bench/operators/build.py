"""Builds an operator's benchmark cases from small functions: its inputs, its reference, its cost, its contestants.

A module of this folder derives one class from `Operator` and registers each implementation with
`Operator.contestant`. References and contestants get their arguments by name: a parameter receives the input of that
name (a leaf where its gradient is computed), the option of that name, or ``dropout_p``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..measure.case import COMPILE_IS_SLOW, PEER, Case, Contestant, Cost, Missing, Run, Tensors, installed, leaf
from ..measure.shapes import Key, Shape, Value, parse

# A shape's keys under their names in the result file. Dropout has a field of its own there.
FIELDS = {"T": "tokens", "M": "masked", "H": "hidden_size", "I": "intermediate_size", "V": "vocab_size", "gelu": "gelu"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a case is built for.

    Attributes:
        shape: a value for every key.
        quick: leave out the contestants that have to be compiled.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    quick: bool = False

    def sizes(self, *keys: str) -> tuple[int, ...]:
        """The values of ``keys``, which are integers."""
        return tuple(int(self.shape[key]) for key in keys)

    @property
    def dropout_p(self) -> float:
        return float(self.shape.get("p", 0.0))


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A key of an operator's shapes: its meaning, its default on a GPU and on a CPU, the allowed words if any."""

    key: str
    meaning: str
    gpu: Value
    cpu: Value
    choices: tuple[str, ...] = ()


class Random:
    """Random tensors of one seed in a setting."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.device, self.dtype = setting.device, setting.dtype
        self.generator = torch.Generator(setting.device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, in the setting's dtype or in ``dtype``."""
        return torch.randn(size, generator=self.generator, dtype=dtype or self.dtype, device=self.device)


# Setting → the reason why a contestant cannot take part, or None.
Gap = Callable[[Any], str | None]


def needs(package: str, install: str) -> Gap:
    """A gap where ``package`` cannot be imported; ``install`` is the command that installs it."""
    return lambda setting: None if installed(package) else f"not installed: {install}"


def cuda_only(setting: Setting) -> str | None:
    """A gap on a CPU."""
    return None if setting.device.type == "cuda" else "runs on CUDA only"


def half_only(setting: Setting) -> str | None:
    """A gap in float32."""
    return None if setting.dtype in (torch.float16, torch.bfloat16) else "takes only fp16 and bf16"


def slow_to_compile(setting: Setting) -> str | None:
    """A gap under ``--quick``."""
    return COMPILE_IS_SLOW if setting.quick else None


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile, compiled anew for each shape."""
    return torch.compile(function, dynamic=False)


def by_name(function: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``available`` that ``function`` has parameters for; all if it takes ``**arguments``."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(available)
    return {name: available[name] for name in parameters if name in available}


# (setting, function, inputs, dropout probability) → the function bound to the inputs, in a layout of its choice
Bind = Callable[[Any, Callable[..., Any], Tensors, float], Run]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    function: Callable[..., Any]
    gaps: tuple[Gap, ...]
    bind: Bind
    contestant: Mapping[str, Any]  # further fields of `Contestant`


class Operator:
    """An operator in the benchmark: derive a class, make one instance, register its contestants.

    Attributes:
        name: as ``--op`` takes it.
        dimensions: the keys of its shapes.
        gpu_shapes, cpu_shapes: built-in shapes as (value, shapes); the lowest value runs first when time is short.
        differentiated: the inputs that get gradients, which are checked.
        passes: those that are timed, see `Case.passes`.
        reference: the specification, called by name.
        yardstick: plain PyTorch, where it is not ``reference`` at the case's dtype.
        result: the name of the forward's result.
    """

    name: ClassVar[str]
    dimensions: ClassVar[tuple[Dimension, ...]]
    gpu_shapes: ClassVar[Sequence[tuple[int, str]]]
    cpu_shapes: ClassVar[Sequence[tuple[int, str]]]
    differentiated: ClassVar[tuple[str, ...]]
    passes: ClassVar[tuple[str, ...]] = ("forward", "backward", "forward+backward")
    result: ClassVar[str] = "out"
    reference: Callable[..., Any]
    yardstick: Callable[..., Any] | None = None

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def setting(self, shape: Shape, device: torch.device, dtype: torch.dtype, quick: bool) -> Setting:
        """What the functions of this operator get.

        Raises:
            ValueError: the shape is impossible.
        """
        return Setting(shape, device, dtype, quick)

    def inputs(self, setting: Any, random: Random) -> Tensors:
        """The canonical inputs, with the result's gradient as "dout" unless the result is a scalar."""
        raise NotImplementedError

    def cost(self, setting: Any) -> tuple[Cost, Cost]:
        """The least work of the forward and of the backward."""
        raise NotImplementedError

    def options(self, setting: Setting) -> dict[str, Any]:
        """Further arguments, by name."""
        return {}

    def describe(self, setting: Any) -> tuple[str, dict[str, Any]]:
        """The case's name and its shape for the result file."""
        words, fields = [], {}
        for dimension in self.dimensions:
            key, value = dimension.key, setting.shape[dimension.key]
            if not isinstance(value, str):
                words.append(f"{'dropout' if key == 'p' else key}={value}")
            elif value != dimension.cpu:
                words.append(value)
            if key in FIELDS:
                fields[FIELDS[key]] = value
        return " ".join(words), fields

    def bind(self, setting: Any, function: Callable[..., Any], inputs: Tensors, dropout_p: float) -> Run:
        """``function`` with its arguments by name, as a contestant is called."""
        leaves = {name: leaf(inputs[name]) for name in self.differentiated}
        available = {**inputs, **leaves, **self.options(setting), "dropout_p": dropout_p}
        grad_output = available.pop("dout", None)
        arguments = by_name(function, available)

        def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
            return {self.result: out, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}

        return Run(lambda: function(**arguments), tuple(leaves.values()), grad_output, named)

    def evaluate(self, setting: Any, inputs: Tensors, dropout_p: float) -> Tensors:
        """Result and gradients by the reference, in float64 if that is the setting's dtype, or by the yardstick."""
        function = self.reference
        if setting.dtype == torch.float64:
            inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        elif self.yardstick is not None:
            function = self.yardstick
        run = self.bind(setting, function, inputs, dropout_p)
        out = run.forward()
        return run.named(out.detach(), run.backward(out))

    def contestant(
        self,
        name: str,
        *gaps: Gap,
        role: str = PEER,
        bind: Bind | None = None,
        replays_dropout: bool = False,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Callable[[Function], Function]:
        """Registers the decorated function as a contestant.

        Args:
            gaps: the first that gives a reason keeps it out of a case, and the reason is reported.
            bind: in place of `bind`.
            role, replays_dropout, context: see `Contestant`.
        """

        def register(function: Function) -> Function:
            fields = {"role": role, "replays_dropout": replays_dropout, "context": context}
            self._entries.append(_Entry(name, function, gaps, bind or self.bind, fields))
            return function

        return register

    def compiled_peer(self, function: Callable[..., Any]) -> None:
        """Registers ``function`` under torch.compile as the peer "torch.compile"."""

        def bind(setting: Any, function: Callable[..., Any], inputs: Tensors, dropout_p: float) -> Run:
            return self.bind(setting, compiled(function), inputs, dropout_p)

        self.contestant("torch.compile", slow_to_compile, bind=bind)(function)

    def missing(self, name: str, reason: str) -> None:
        """Names a peer that never takes part."""
        self.contestant(name, lambda setting: reason)(lambda: None)

    def keys(self, device: torch.device) -> dict[str, Key]:
        """The keys of a shape with their defaults on ``device``."""
        on_gpu = device.type == "cuda"
        return {d.key: Key(d.meaning, d.gpu if on_gpu else d.cpu, d.choices) for d in self.dimensions}

    def built_in(self, device: torch.device) -> Sequence[tuple[int, str]]:
        """The built-in shapes as (value, shapes)."""
        return self.gpu_shapes if device.type == "cuda" else self.cpu_shapes

    def cases(
        self, device: torch.device, dtype: torch.dtype, *, quick: bool = False, shapes: str | None = None
    ) -> list[Case]:
        """The cases of ``shapes``, in their order, or the built-in ones (``quick``: the first of them).

        Raises:
            ValueError: as `parse`, or a shape is impossible.
        """
        keys = self.keys(device)
        if shapes is not None:
            wanted = list(enumerate(parse(shapes, keys)))
        else:
            wanted = [(value, shape) for value, text in self.built_in(device) for shape in parse(text, keys)]
            wanted = wanted[: 1 if quick else None]
        return [self.case(self.setting(shape, device, dtype, quick), value) for value, shape in wanted]

    def case(self, setting: Any, value: int = 0) -> Case:
        """The case of a setting; ``value`` orders cases when time is short."""
        contestants, missing = [], []
        for entry in self._entries:
            gap = next(filter(None, (gap(setting) for gap in entry.gaps)), None)
            if gap is None:
                bind = functools.partial(entry.bind, setting, entry.function)
                contestants.append(Contestant(entry.name, bind, **entry.contestant))
            else:
                missing.append(Missing(entry.name, gap))
        name, shape = self.describe(setting)
        forward, backward = self.cost(setting)
        both = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
        costs = {"inference": forward, "forward": forward, "backward": backward, "forward+backward": both}
        return Case(
            op=self.name,
            name=name,
            dtype=setting.dtype,
            device=setting.device,
            shape=shape,
            inputs=functools.partial(self._inputs, setting),
            oracle=functools.partial(self.evaluate, dataclasses.replace(setting, dtype=torch.float64)),
            yardstick=functools.partial(self.evaluate, setting),
            passes={which: costs[which] for which in self.passes},
            contestants=tuple(contestants),
            missing=tuple(missing),
            dropout_p=setting.dropout_p,
            value=value,
        )

    def _inputs(self, setting: Setting, seed: int) -> Tensors:
        inputs = self.inputs(setting, Random(setting, seed))
        if "p" in setting.shape:
            inputs["seed"] = torch.tensor([seed], dtype=torch.int64, device=setting.device)
        return inputs
