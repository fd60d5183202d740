"""LayerNorms and RMSNorms on the kernels, alone or with the dropout and the residual before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import dropout_add_layernorm, layernorm, reference, rmsnorm
from .swap import Fused, why_touched


class FusedNorm(Fused):
    """``nn.LayerNorm`` over one axis."""

    by = "layernorm"
    only_kernels = True

    @staticmethod
    def matches(module: Any) -> bool:
        return isinstance(module, nn.LayerNorm)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if type(module) is not nn.LayerNorm:
            return "a subclass of nn.LayerNorm, which may have another forward"
        return cls.axes_obstacle(module)

    @staticmethod
    def axes_obstacle(module: Any) -> str | None:
        return None if len(module.normalized_shape) == 1 else f"normalises {len(module.normalized_shape)} axes"

    def forward(self: Any, input: Tensor) -> Tensor:
        if input.shape[-1:] != self.normalized_shape or is_elsewhere(self.weight, input):
            return self.original.forward(self, input)  # raises PyTorch's error
        return layernorm(input, self.weight, self.bias, eps=self.eps)


def is_elsewhere(parameter: Tensor | None, x: Tensor) -> bool:
    """Whether a parameter is on another device than ``x``: offloaded, for example, and brought back by its module."""
    return parameter is not None and parameter.device != x.device


def has_code_of(function: Any, cls: type[nn.Module]) -> bool:
    """Whether ``cls.forward`` compiles to the code of ``function``, whatever the class is called."""
    ours, theirs = function.__code__, getattr(cls.forward, "__code__", None)
    return all(getattr(theirs, part, None) == getattr(ours, part) for part in ("co_code", "co_names", "co_varnames"))


def _rms_norm(self, hidden_states):  # type: ignore[no-untyped-def]
    """The forward that `FusedRMSNorm` replaces: its bytecode is compared."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


class FusedRMSNorm(Fused):
    """Transformers' RMSNorm of Llama, EuroBERT and others, each a class of its own with the same code."""

    by = "rmsnorm"
    only_kernels = True

    @staticmethod
    def matches(module: Any) -> bool:
        return has_code_of(_rms_norm, module.original if isinstance(module, Fused) else type(module))

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype or is_elsewhere(self.weight, hidden_states):
            return self.original.forward(self, hidden_states)
        return rmsnorm(hidden_states, self.weight, eps=self.variance_epsilon)


def add_norm(x: Tensor, residual: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> Tensor:
    """norm(residual + dropout(x)), in one kernel where it takes the operands.

    Args:
        x, residual: [..., H].
    """
    p = dropout.p if dropout.training else 0.0
    mixed = x.dtype != residual.dtype and not torch.is_autocast_enabled(x.device.type)
    if mixed or p >= 1.0 or x.shape != residual.shape or is_elsewhere(norm.weight, x):
        return norm(dropout(x) + residual)
    return dropout_add_layernorm(x, residual, norm.weight, norm.bias, eps=norm.eps, p=p)


def _post_norm(self, hidden_states, input_tensor):  # type: ignore[no-untyped-def]
    """The forward that `FusedPostNorm` replaces: its bytecode is compared."""
    hidden_states = self.dense(hidden_states)
    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)
    return hidden_states


class FusedPostNorm(Fused):
    """The end of a post-LN sub-layer, such as ``BertOutput``: LayerNorm(residual + dropout(dense(x)))."""

    by = "dropout_add_layernorm"
    only_kernels = True

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether the forward compiles to the code of `_post_norm`, whatever the class is called."""
        if isinstance(module, FusedPostNorm):
            return True
        return has_code_of(_post_norm, type(module))

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return cls.touched(module) or FusedNorm.axes_obstacle(module.LayerNorm)

    @classmethod
    def touched(cls, module: Any) -> str | None:
        norm, dropout = module.LayerNorm, module.dropout
        return why_touched(norm, nn.LayerNorm, "LayerNorm") or why_touched(dropout, nn.Dropout, "dropout")

    @classmethod
    def parts(cls, module: Any) -> tuple[Any, ...]:
        return module.LayerNorm, module.dropout

    @classmethod
    def runs(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        dropout = module.dropout
        return super().runs(module, args, kwargs) or bool(dropout.training and getattr(dropout, "p", 0.0) > 0.0)

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not Fused.runs(self, (hidden_states,), {}):  # gains faster dropout
            dropped = reference.dropout(self.dense(hidden_states), self.dropout.p)
            return self.LayerNorm(dropped + input_tensor)
        return add_norm(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)
