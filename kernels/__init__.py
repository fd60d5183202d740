"""Fused operators for bidirectional encoders. Each can be called on its own, without a model."""

from .attn import attention, attention_dropout_mask, attention_varlen, attention_varlen_separate
from .backend import use_backend
from .dropout import dropout_mask
from .embedding import embed_layernorm
from .gelu import FusedLinearGELU, bias_gelu
from .mlm import cross_entropy, masked_lm_loss
from .norm import FusedDropoutAddLayerNorm, FusedLayerNorm, FusedRMSNorm, dropout_add_layernorm, layernorm, rmsnorm

__all__ = [
    "FusedDropoutAddLayerNorm",
    "FusedLayerNorm",
    "FusedLinearGELU",
    "FusedRMSNorm",
    "attention",
    "attention_dropout_mask",
    "attention_varlen",
    "attention_varlen_separate",
    "bias_gelu",
    "cross_entropy",
    "dropout_add_layernorm",
    "dropout_mask",
    "embed_layernorm",
    "layernorm",
    "masked_lm_loss",
    "rmsnorm",
    "use_backend",
]
