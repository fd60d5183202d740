"""The modules that `fuse` changes: how an instance gets a fused forward, and PyTorch's own modules with one.

An instance is fused by giving it another class: a subclass of the one it had, with the same name and another
``forward``. Parameters, buffers, hooks, ``state_dict`` keys and everything that asks ``isinstance`` stay as they were,
copies and pickles stay fused, and no class or function of another library is touched. Each forward here calls the
original one where a call asks for something it does not do.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import attention, dropout_add_layernorm, layernorm
from ...kernels.attn.api import MAX_HEAD_DIM
from .attention_interface import register_attention


class Fused(nn.Module):
    """A template: mixed in before ``original``, the class that the instance had."""

    original: Any
    by: str  # what runs now, for the report; each template has one

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why ``module``, not fused yet, is not for this template; None where it is."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        template = next(cls for cls in type(self).__mro__ if "by" in vars(cls))
        return _restore, (template, self.original), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(part for part in (self.original.extra_repr(self), "fused") if part)


def swap_class(module: nn.Module, template: Any) -> None:
    """Give ``module`` the forward of ``template``."""
    original: Any = type(module)
    module.__class__ = _fused_class(template, original)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`; nothing where there is nothing to undo."""
    if isinstance(module, Fused):
        module.__class__ = module.original


@functools.cache
def _fused_class(template: Any, original: Any) -> Any:
    """``original`` with ``template``'s forward. It keeps its names: configurations, wrapping policies and checkpoints
    know modules by them; and forward's signature: trainers drop the columns that are not in it."""
    written = template.forward
    forward: Any = FunctionType(written.__code__, written.__globals__, "forward", written.__defaults__)
    forward.__kwdefaults__ = written.__kwdefaults__
    forward.__signature__ = inspect.signature(original.forward)
    names = {"original": original, "forward": forward}
    names |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (template, original), names)


def _restore(template: Any, original: Any) -> Any:
    """An empty instance, for `copy` and `pickle` to fill; in a process that may not have called `fuse`."""
    if "transformers.modeling_utils" in sys.modules:
        register_attention()
    fused = _fused_class(template, original)
    return fused.__new__(fused)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


# ------------------------------------------------------------------------------------------------------------ LayerNorm


class FusedNorm(Fused):
    by = "layernorm"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if type(module) is not nn.LayerNorm:
            return "a subclass of nn.LayerNorm, whose forward may do more"
        return None if len(module.normalized_shape) == 1 else f"normalises {len(module.normalized_shape)} axes"

    def forward(self: Any, input: Tensor) -> Tensor:
        if input.shape[-1:] != self.normalized_shape:
            return self.original.forward(self, input)  # raises PyTorch's error
        return layernorm(input, self.weight, self.bias, eps=self.eps)


def add_norm(x: Tensor, residual: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> Tensor:
    """norm(residual + dropout(x)), by one kernel where it takes the operands."""
    p = dropout.p if dropout.training else 0.0
    mixed = x.dtype != residual.dtype and not torch.is_autocast_enabled(x.device.type)
    if mixed or p >= 1.0 or x.shape != residual.shape:
        return norm(dropout(x) + residual)
    return dropout_add_layernorm(x, residual, norm.weight, norm.bias, eps=norm.eps, p=p)


class FusedPostNorm(Fused):
    """dense, dropout, and LayerNorm of the sum with the residual, as `_post_norm` writes it."""

    by = "dropout_add_layernorm"

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        """Whether it runs `_post_norm`, whatever its name: the same instructions over the same names."""
        if isinstance(module, FusedPostNorm):
            return True
        code, theirs = _post_norm.__code__, getattr(type(module).forward, "__code__", None)
        return all(
            getattr(theirs, part, None) == getattr(code, part) for part in ("co_code", "co_names", "co_varnames")
        )

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        norm, dropout = module.LayerNorm, module.dropout
        if type(dropout) is not nn.Dropout or not (isinstance(norm, FusedNorm) or FusedNorm.why_not(norm) is None):
            return "its dropout or LayerNorm is of another kind"
        return "its dropout or LayerNorm has hooks" if has_hooks(dropout) or has_hooks(norm) else None

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if FusedPostNorm.why_not(self) is not None:  # an adapter may have wrapped a part since, or a hook been added
            return self.original.forward(self, hidden_states, input_tensor)
        return add_norm(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)


def _post_norm(self, hidden_states, input_tensor):  # type: ignore[no-untyped-def]
    """What a forward must be, instruction for instruction, for `FusedPostNorm`'s to take its place."""
    hidden_states = self.dense(hidden_states)
    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)
    return hidden_states


# -------------------------------------------------------------------------------------------------- torch.nn's encoders


def _is_plain(x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool | None) -> bool:
    """A padded batch and a bool padding mask at most: a float one may hold any bias, as only reading it would show."""
    is_padding = padding is None or padding.dtype == torch.bool
    return mask is None and not is_causal and x.dim() == 3 and not x.is_nested and is_padding


class FusedMultiheadAttention(Fused):
    """Self-attention without weights and without an attention mask; the rest is PyTorch's."""

    by = "attention, where need_weights=False and there is no attn_mask"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if type(module) is not nn.MultiheadAttention:
            return "a subclass of nn.MultiheadAttention, whose forward may do more"
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            return "it has keys or values of another size, bias_k or add_zero_attn"
        return None if module.head_dim <= MAX_HEAD_DIM else f"it has heads of {module.head_dim}, above {MAX_HEAD_DIM}"

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        to_itself = query is key and key is value
        if need_weights or not to_itself or not _is_plain(query, attn_mask, key_padding_mask, is_causal):
            return self.original.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4) if self.batch_first else qkv.permute(2, 1, 3, 0, 4)  # (B, H, N, D)
        real = None if key_padding_mask is None else ~key_padding_mask
        out = attention(q, k, v, key_padding_mask=real, dropout_p=self.dropout if self.training else 0.0)
        out = (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None


class FusedEncoderLayer(Fused):
    """`nn.TransformerEncoderLayer` around a fused attention; post-LN with the dropout and the residual in the norm."""

    by = "attention, and dropout_add_layernorm if post-LN, where there is no src_mask"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if type(module) is not nn.TransformerEncoderLayer:
            return "a subclass of nn.TransformerEncoderLayer, whose forward may do more"
        if not isinstance(module.self_attn, FusedMultiheadAttention):
            return "its attention is not fused"
        dropouts, norms = (module.dropout1, module.dropout2), (module.norm1, module.norm2)
        if any(type(dropout) is not nn.Dropout for dropout in dropouts):
            return "its dropout is of another kind"
        return "its dropouts or norms have hooks" if any(map(has_hooks, dropouts + norms)) else None

    def forward(
        self: Any,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not _is_plain(src, src_mask, src_key_padding_mask, is_causal):
            return self.original.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        x, padding = src, src_key_padding_mask
        if self.norm_first:
            normed = self.norm1(x)
            x = x + self.dropout1(self.self_attn(normed, normed, normed, padding, need_weights=False)[0])
            return x + self.dropout2(_feed_forward(self, self.norm2(x)))
        attended = self.self_attn(x, x, x, padding, need_weights=False)[0]
        if not all(isinstance(norm, FusedNorm) for norm in (self.norm1, self.norm2)):
            x = self.norm1(x + self.dropout1(attended))
            return self.norm2(x + self.dropout2(_feed_forward(self, x)))
        x = add_norm(attended, x, self.dropout1, self.norm1)
        return add_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


class FusedEncoder(Fused):
    """`nn.TransformerEncoder` whose layers get the padding mask as it came, where PyTorch makes it a float mask."""

    by = "the padding mask reaches the layers as it came, where there is no mask"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if type(module) is not nn.TransformerEncoder:
            return "a subclass of nn.TransformerEncoder, whose forward may do more"
        return None if all(isinstance(x, FusedEncoderLayer) for x in module.layers) else "its layers are not all fused"

    def forward(
        self: Any,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if not _is_plain(src, mask, src_key_padding_mask, is_causal):
            return self.original.forward(self, src, mask, src_key_padding_mask, is_causal)
        for layer in self.layers:
            src = layer(src, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)
