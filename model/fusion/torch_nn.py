"""PyTorch's own attention and encoder modules on the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...kernels import attention
from ...kernels.checks import MAX_HEAD_DIM
from .norms import FusedNorm, add_norm, is_elsewhere
from .swap import Fused, why_touched


def _is_supported(x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool | None) -> bool:
    """Whether the input is a padded batch with at most a bool padding mask. A float mask may hold any bias."""
    is_padding = padding is None or padding.dtype == torch.bool
    return mask is None and not is_causal and x.dim() == 3 and not x.is_nested and is_padding


class FusedMultiheadAttention(Fused):
    """``nn.MultiheadAttention``: self-attention that returns no weights and takes no attention mask."""

    by = "attention, where need_weights=False and there is no attn_mask"
    only_kernels = True

    @staticmethod
    def matches(module: Any) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if type(module) is not nn.MultiheadAttention:
            return "a subclass of nn.MultiheadAttention, which may have another forward"
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            return "it has keys or values of another size, bias_k or add_zero_attn"
        size = module.head_dim
        return None if size <= MAX_HEAD_DIM else f"its heads have size {size}, above {MAX_HEAD_DIM}"

    @classmethod
    def touched(cls, module: Any) -> str | None:
        return why_touched(module.out_proj, NonDynamicallyQuantizableLinear, "out_proj")

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
        self_attention = query is key and key is value
        supported = self_attention and _is_supported(query, attn_mask, key_padding_mask, is_causal)
        elsewhere = is_elsewhere(self.in_proj_weight, query) or is_elsewhere(self.out_proj.weight, query)
        if need_weights or not supported or elsewhere:
            return self.original.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4) if self.batch_first else qkv.permute(2, 1, 3, 0, 4)  # [B, H, N, D]
        real = None if key_padding_mask is None else ~key_padding_mask  # [B, N]
        out = attention(
            q, k, v, key_padding_mask=real, dropout_p=self.dropout if self.training else 0.0
        )  # [B, H, N, D]
        out = (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)  # shape of query
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None


class FusedEncoderLayer(Fused):
    """``nn.TransformerEncoderLayer`` with a fused attention; post-LN norms take the dropout and the residual."""

    by = "attention, and dropout_add_layernorm if post-LN, where there is no src_mask"
    only_kernels = True

    @staticmethod
    def matches(module: Any) -> bool:
        return isinstance(module, nn.TransformerEncoderLayer)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if type(module) is not nn.TransformerEncoderLayer:
            return "a subclass of nn.TransformerEncoderLayer, which may have another forward"
        return None if isinstance(module.self_attn, FusedMultiheadAttention) else "its attention is not fused"

    @classmethod
    def touched(cls, module: Any) -> str | None:
        for name in ("_sa_block", "_ff_block"):
            if name in module.__dict__:
                return f"its {name} was replaced on the instance"
        return (
            why_touched(module.self_attn, nn.MultiheadAttention, "self_attn")
            or why_touched(module.norm1, nn.LayerNorm, "norm1")
            or why_touched(module.norm2, nn.LayerNorm, "norm2")
            or why_touched(module.dropout1, nn.Dropout, "dropout1")
            or why_touched(module.dropout2, nn.Dropout, "dropout2")
        )

    def forward(
        self: Any,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not _is_supported(src, src_mask, src_key_padding_mask, is_causal):
            return self.original.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        x, padding = src, src_key_padding_mask  # [B, N, H] or [N, B, H], [B, N]
        if self.norm_first:
            normed = self.norm1(x)
            x = x + self.dropout1(_attend(self, normed, padding))
            return x + self.dropout2(_feed_forward(self, self.norm2(x)))
        attended = _attend(self, x, padding)
        if not all(isinstance(norm, FusedNorm) for norm in (self.norm1, self.norm2)):
            x = self.norm1(x + self.dropout1(attended))
            return self.norm2(x + self.dropout2(_feed_forward(self, x)))
        x = add_norm(attended, x, self.dropout1, self.norm1)
        return add_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)


def _attend(layer: Any, x: Tensor, padding: Tensor | None) -> Tensor:
    return layer.self_attn(x, x, x, attn_mask=None, key_padding_mask=padding, need_weights=False, is_causal=False)[0]


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


class FusedEncoder(Fused):
    """``nn.TransformerEncoder`` that passes a bool padding mask to its layers; PyTorch's own makes it a float mask."""

    by = "passes the padding mask to its layers unchanged, where there is no mask"
    only_kernels = True

    @staticmethod
    def matches(module: Any) -> bool:
        return isinstance(module, nn.TransformerEncoder)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if type(module) is not nn.TransformerEncoder:
            return "a subclass of nn.TransformerEncoder, which may have another forward"
        return None  # see touched

    @classmethod
    def touched(cls, module: Any) -> str | None:
        fused = all(isinstance(layer, FusedEncoderLayer) and "forward" not in layer.__dict__ for layer in module.layers)
        return None if fused else "not all of its layers are fused"

    def forward(
        self: Any,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if not _is_supported(src, mask, src_key_padding_mask, is_causal):
            return self.original.forward(self, src, mask, src_key_padding_mask, is_causal)
        for layer in self.layers:
            src = layer(src, src_mask=None, is_causal=False, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)
