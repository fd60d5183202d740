"""Give a module instance another ``forward`` by changing its class.

The new class is a subclass of the old one with the same name. Parameters, buffers, hooks, ``state_dict`` keys and
``isinstance`` checks stay as they were, copies and pickles stay fused, and other libraries' classes and functions are
not modified.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...kernels.backend import choose_backend
from .attention_interface import register_attention


class Fused(nn.Module):
    """Base of the templates. A fused class inherits from a template and from ``original``, in this order.

    A template's forward calls ``self.original.forward(self, ...)`` where the kernels do not compute what a call
    requests. A template without a forward keeps the original one. The original forward also
    runs for a call where `touched` gives a reason, and after `unfuse` where a wrapper kept the bound method.

    Attributes:
        by: what runs now, for the report.
        only_kernels: the original forward runs where `runs` is False: where the kernels do not run, as on a CPU, unless
            the template gains something else.
        asks: the template's forward calls `is_untouched` itself, after a cheaper question.
        template: the template of a fused class.
        original: the class that the instance had before.
    """

    by: str
    only_kernels = False
    asks = False
    template: Any
    original: Any

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether ``module``, fused or not, is of the kind that this template replaces."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """The reason why a ``module`` that matches cannot be fused, or None."""
        raise NotImplementedError

    @classmethod
    def touched(cls, module: Any) -> str | None:
        """The reason why a part of ``module`` may differ from what its class says, or None. Holds at every call."""
        return None

    @classmethod
    def runs(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the template's forward gains anything in this call. Asked for `only_kernels`."""
        return kernels_run(args, kwargs)

    @classmethod
    def parts(cls, module: Any) -> Iterable[Any]:
        """The modules inside ``module`` that `touched` looks at."""
        return list(module.modules())[1:]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _fused_class_of(type(self)) is not type(self):  # another library's class on top
            return super().__reduce_ex__(protocol)
        state = {name: value for name, value in self.__dict__.items() if name != SEEN}
        return _empty_instance, (self.template, self.original), state

    def extra_repr(self) -> str:
        return ", ".join(part for part in (self.original.extra_repr(self), "fused") if part)


def swap_class(module: nn.Module, template: Any) -> None:
    """Give ``module`` the forward of ``template``."""
    original: Any = type(module)
    module.__class__ = _fused_class(template, original)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`. Does nothing if ``module`` is not fused. Classes that others put on top since stay."""
    cls: Any = type(module)
    fused = _fused_class_of(cls)
    if fused is not None:
        module.__class__ = _without(cls, fused)
        vars(module).pop(SEEN, None)


def _fused_class_of(cls: Any) -> Any:
    """The class in ``cls``'s method resolution order that `swap_class` made, or None."""
    return next((base for base in cls.__mro__ if "template" in vars(base)), None)


@functools.cache
def _without(cls: Any, fused: Any) -> Any:
    """``cls``, derived from ``fused``, as if it were derived from the class that ``fused`` replaced."""
    if cls is fused:
        return fused.original
    if fused not in cls.__mro__:
        return cls
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(_without(base, fused) for base in cls.__bases__), members)


def class_name(cls: Any) -> str:
    """``package.module.Class`` of the class that ``cls`` is, or was before `fuse`."""
    cls = cls.original if issubclass(cls, Fused) else cls
    return f"{cls.__module__}.{cls.__qualname__}"


CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def why_touched(part: Any, kind: type, name: str, hooks: tuple[str, ...] = CALL_HOOKS + STATE_HOOKS) -> str | None:
    """The reason why fused code must not compute what ``part`` computes, or None.

    Args:
        part: a module that the fused code does not call.
        kind: the class, fused or not, that the fused code was written for. A subclass may compute anything: adapters,
            FSDP2 and parametrizations derive one.
        name: what the reason calls the part.
        hooks: the attributes with hooks to look at.
    """
    cls = type(part)
    if cls is not kind and cls.__dict__.get("original") is not kind:
        return f"its {name} is of another kind ({cls.__name__})"
    own = part.__dict__
    if "forward" in own:
        return f"the forward of its {name} was replaced on the instance"
    return f"its {name} has hooks" if any(map(own.get, hooks)) else None


# Attribute of a fused module: what its parts were when `touched` last gave no reason.
SEEN = "_fusebert_seen"
METHODS = ("forward", "_sa_block", "_ff_block")  # that fused code replaces


def kernels_run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the kernels can run in a call with these arguments."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return not isinstance(x, Tensor) or x.is_cuda or choose_backend(x) != "reference"


def is_untouched(module: Any, template: Any) -> bool:
    """Whether ``template.touched(module)`` is None, without calling it where nothing changed since the last time.

    A hook on any module advances ``RemovableHandle.next_id``. The rest is compared.
    """
    if torch.compiler.is_compiling():
        return template.touched(module) is None
    own = module.__dict__
    seen = own.get(SEEN)
    if seen is not None and seen[0] == RemovableHandle.next_id and _is_as_seen(own, *seen[1:]):
        return True
    own.pop(SEEN, None)
    if template.touched(module) is not None:
        return False
    parts = list(template.parts(module))
    own[SEEN] = (RemovableHandle.next_id, _children(own), [part.__dict__ for part in parts], parts, *_look(parts))
    return True


def _is_as_seen(own: dict[str, Any], children: tuple[Any, ...], dicts: list[Any], parts: list[Any], *seen: Any) -> bool:
    return (
        _children(own) == children
        and own.keys().isdisjoint(METHODS[1:])
        and not any(any(map(dict.__contains__, dicts, repeat(name))) for name in METHODS)
        and _look(parts) == seen
    )


def _look(parts: list[Any]) -> tuple[Any, ...]:
    """What may change without a hook: classes, children, configurations and their attention. Without a Python loop over
    all ``parts``, because it is called at each forward."""
    dicts = [part.__dict__ for part in parts]
    classes = [part.__class__ for part in parts]
    inner = list(map(tuple, map(dict.values, map(itemgetter("_modules"), dicts))))
    configs = list({id(x): x for x in map(dict.get, dicts, repeat("config")) if x is not None}.values())
    return classes, inner, configs, [getattr(config, "_attn_implementation", None) for config in configs]


def _children(own: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(own["_modules"].values())


@functools.cache
def _fused_class(template: Any, original: Any) -> Any:
    """``original`` with ``template``'s forward.

    The names are kept because configurations, wrapping policies and checkpoints refer to classes by name. The signature
    of forward is kept because trainers drop the dataset columns that it does not contain.
    """
    members = {"original": original, "template": template}
    members |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if "forward" in vars(template):

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if template.only_kernels and not template.runs(self, args, kwargs):
                return original.forward(self, *args, **kwargs)
            fused = isinstance(self, Fused) and (template.asks or is_untouched(self, template))
            return (template if fused else original).forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        members["forward"] = forward
    return type(original.__name__, (template, original), members)


def _empty_instance(template: Any, original: Any) -> Any:
    """An instance for `copy` and `pickle` to fill, in a process that may not have called `fuse`."""
    if "transformers.modeling_utils" in sys.modules:
        register_attention()
    fused = _fused_class(template, original)
    return fused.__new__(fused)
