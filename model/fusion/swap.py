"""Give a module instance another ``forward`` by changing its class.

The new class is a subclass of the old one with the same name. Parameters, buffers, hooks, ``state_dict`` keys and
``isinstance`` checks stay as they were, copies and pickles stay fused, and other libraries' classes and functions are
not modified.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch import nn

from .attention_interface import register_attention


class Fused(nn.Module):
    """Base of the templates. A fused class inherits from a template and from ``original``, in this order.

    A template's forward calls ``self.original.forward(self, ...)`` where the kernels do not compute what a call
    requests. A template without a forward keeps the original one. The original forward also
    runs for a call where `touched` gives a reason, and after `unfuse` where a wrapper kept the bound method.

    Attributes:
        by: what runs now, for the report.
        template: the template of a fused class.
        original: the class that the instance had before.
    """

    by: str
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
        """The reason why a part of ``module`` may differ from what its class says, or None. Asked at every call."""
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _fused_class_of(type(self)) is not type(self):  # another library's class on top
            return super().__reduce_ex__(protocol)
        return _empty_instance, (self.template, self.original), self.__dict__

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


def original_class_name(module: nn.Module) -> str:
    """``package.module.Class`` of the class that ``module`` has, or had before `fuse`."""
    cls = module.original if isinstance(module, Fused) else type(module)
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
            fused = isinstance(self, Fused) and template.touched(self) is None
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
