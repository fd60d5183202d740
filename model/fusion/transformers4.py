"""BERT and RoBERTa of Transformers 4: their attention is a class of its own, without an ``attn_implementation``.

These models expand a padding mask to [B, 1, N, N] before the layers, where it looks like any other mask. Here the mask
reaches the layers as [B, N]. Each attention passes it to the kernel or, for a call that the kernel does not compute,
expands it and calls the original forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import attention
from ...kernels.checks import MAX_HEAD_DIM
from .attention_interface import NAME
from .masks import additive_mask
from .swap import Fused, class_name

# Name of the model's file → prefix of its classes.
PREFIXES = {"bert": "Bert", "roberta": "Roberta", "camembert": "Camembert", "xlm_roberta": "XLMRoberta"}


def _classes(suffix: str) -> frozenset[str]:
    return frozenset(
        f"transformers.models.{file}.modeling_{file}.{prefix}{suffix}" for file, prefix in PREFIXES.items()
    )


SELF_ATTENTIONS = _classes("SdpaSelfAttention")  # Transformers 5 has no such classes
MODELS = _classes("Model")


class FusedSelfAttention(Fused):
    by = "attention, where there is no head_mask and no attention weights are requested"

    @staticmethod
    def matches(module: Any) -> bool:
        return class_name(type(module)) in SELF_ATTENTIONS

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if module.is_decoder:
            return "its attention is causal"
        if module.position_embedding_type != "absolute":
            return f"it adds positions to the scores ({module.position_embedding_type})"
        size = module.attention_head_size
        return None if size <= MAX_HEAD_DIM else f"its heads have size {size}, above {MAX_HEAD_DIM}"

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        others = any(x is not None and x is not False for x in (*args, *kwargs.values()))
        if others or not (attention_mask is None or attention_mask.dim() == 2):
            if attention_mask is not None and attention_mask.dim() == 2:
                attention_mask = additive_mask(attention_mask[:, None, None], hidden_states.dtype)  # [B, 1, 1, N]
            return self.original.forward(self, hidden_states, attention_mask, *args, **kwargs)
        q, k, v = (  # [B, H, N, D]
            linear(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        p = self.dropout_prob if self.training else 0.0
        return attention(q, k, v, key_padding_mask=attention_mask, dropout_p=p).transpose(1, 2).flatten(2), None


class PaddingMaskModel(Fused):
    """The model around `FusedSelfAttention`, with its own forward: it passes a padding mask [B, N] to its layers."""

    by = "passes the padding mask to its layers unchanged"

    @staticmethod
    def matches(module: Any) -> bool:
        return class_name(type(module)) in MODELS and any(map(FusedSelfAttention.matches, module.modules()))

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        parts = filter(FusedSelfAttention.matches, module.modules())
        return None if all(isinstance(part, FusedSelfAttention) for part in parts) else "its attention is not fused"

    @property
    def attn_implementation(self) -> str:
        """For any name but "sdpa", the model's forward calls the method below instead of expanding the mask itself."""
        return NAME

    def get_extended_attention_mask(self: Any, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if attention_mask.dim() != 2:
            return self.original.get_extended_attention_mask(self, attention_mask, *args, **kwargs)
        return attention_mask.to(torch.bool)
