"""Give a module instance another ``forward`` by changing its class.

The new class is a subclass of the old one with the same name. Parameters, buffers, hooks, ``state_dict`` keys and
``isinstance`` checks stay as they were, copies and pickles stay fused, and other libraries' classes and functions are
not modified.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any

from torch import nn

from .attention_interface import register_attention


class Fused(nn.Module):
    """Base of the templates. A fused class inherits from a template and from ``original``, in this order.

    A template's forward calls ``self.original.forward(self, ...)`` where the kernels do not compute what a call
    requests. A template without a forward keeps the original one.

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

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_instance, (self.template, self.original), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(part for part in (self.original.extra_repr(self), "fused") if part)


def swap_class(module: nn.Module, template: Any) -> None:
    """Give ``module`` the forward of ``template``."""
    original: Any = type(module)
    module.__class__ = _fused_class(template, original)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`. Does nothing if ``module`` is not fused."""
    if isinstance(module, Fused):
        module.__class__ = module.original


def original_class_name(module: nn.Module) -> str:
    """``package.module.Class`` of the class that ``module`` has, or had before `fuse`."""
    cls = module.original if isinstance(module, Fused) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@functools.cache
def _fused_class(template: Any, original: Any) -> Any:
    """``original`` with ``template``'s forward.

    The names are kept because configurations, wrapping policies and checkpoints refer to classes by name. The signature
    of forward is kept because trainers drop the dataset columns that it does not contain.
    """
    members = {"original": original, "template": template}
    members |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if "forward" in vars(template):
        written = template.forward
        forward: Any = FunctionType(written.__code__, written.__globals__, "forward", written.__defaults__)
        forward.__kwdefaults__ = written.__kwdefaults__
        forward.__signature__ = inspect.signature(original.forward)
        members["forward"] = forward
    return type(original.__name__, (template, original), members)


def _empty_instance(template: Any, original: Any) -> Any:
    """An instance for `copy` and `pickle` to fill, in a process that may not have called `fuse`."""
    if "transformers.modeling_utils" in sys.modules:
        register_attention()
    fused = _fused_class(template, original)
    return fused.__new__(fused)
