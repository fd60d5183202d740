"""Fused operators for bidirectional encoders. Each name below stands alone: no model is needed to use it."""

from .attn import attention, attention_dropout_mask, attention_varlen, attention_varlen_separate
from .backend import use_backend
from .dropout import dropout_mask
from .embedding.api import embed_layernorm
from .gelu import FusedLinearGELU, bias_gelu
from .mlm import cross_entropy, masked_lm_loss
from .norm.api import FusedDropoutAddLayerNorm, FusedLayerNorm, FusedRMSNorm, dropout_add_layernorm, layernorm, rmsnorm

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
