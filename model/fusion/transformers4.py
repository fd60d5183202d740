"""BERT and RoBERTa of Transformers 4, whose attention is a class of its own and not yet an ``attn_implementation``.

Their models expand a padding mask to [B, 1, N, N] before the layers, where it can no longer be told from any other
mask. Here the model is kept from that, so that the mask reaches the layers as [B, N], and each layer's attention takes
it or, for what the kernel does not compute, expands it and calls the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import attention
from ...kernels.attn.api import MAX_HEAD_DIM
from .attention_interface import NAME, additive_mask
from .torch_nn import Fused

# File of the model, and how its classes are called.
PREFIXES = {"bert": "Bert", "roberta": "Roberta", "camembert": "Camembert", "xlm_roberta": "XLMRoberta"}


def _classes(suffix: str) -> frozenset[str]:
    return frozenset(
        f"transformers.models.{file}.modeling_{file}.{prefix}{suffix}" for file, prefix in PREFIXES.items()
    )


def _is_class_of(module: Any, names: frozenset[str]) -> bool:
    cls = module.original if isinstance(module, Fused) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}" in names


class FusedSelfAttention(Fused):
    by = "attention, where there is no head_mask and no attention weights are asked for"
    classes = _classes("SdpaSelfAttention")  # Transformers 5 has no such class

    @staticmethod
    def is_one(module: Any) -> bool:
        return _is_class_of(module, FusedSelfAttention.classes)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.is_decoder:
            return "its attention is causal"
        if module.position_embedding_type != "absolute":
            return f"it adds positions to the scores ({module.position_embedding_type})"
        size = module.attention_head_size
        return None if size <= MAX_HEAD_DIM else f"it has heads of {size}, above {MAX_HEAD_DIM}"

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        others = any(x is not None and x is not False for x in (*args, *kwargs.values()))
        if others or not (attention_mask is None or attention_mask.dim() == 2):
            if attention_mask is not None and attention_mask.dim() == 2:
                attention_mask = additive_mask(attention_mask[:, None, None], hidden_states.dtype)
            return self.original.forward(self, hidden_states, attention_mask, *args, **kwargs)
        q, k, v = (  # (B, H, N, D)
            linear(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        p = self.dropout_prob if self.training else 0.0
        return attention(q, k, v, key_padding_mask=attention_mask, dropout_p=p).transpose(1, 2).flatten(2), None


class FusedMaskModel(Fused):
    """The model around `FusedSelfAttention`; its forward is its own."""

    by = "the padding mask reaches the layers as it came"
    classes = _classes("Model")

    @staticmethod
    def is_one(module: Any) -> bool:
        return _is_class_of(module, FusedMaskModel.classes) and any(map(FusedSelfAttention.is_one, module.modules()))

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        parts = filter(FusedSelfAttention.is_one, module.modules())
        return None if all(isinstance(part, FusedSelfAttention) for part in parts) else "its attention is not fused"

    @property
    def attn_implementation(self) -> str:
        """What forward asks before it expands the mask itself; for any name but "sdpa" it calls the method below."""
        return NAME

    def get_extended_attention_mask(self: Any, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if attention_mask.dim() != 2:
            return self.original.get_extended_attention_mask(self, attention_mask, *args, **kwargs)
        return attention_mask.to(torch.bool)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.original.forward(self, *args, **kwargs)
