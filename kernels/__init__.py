"""Fused operators for bidirectional encoders. Each name below stands alone: no model is needed to use it."""

from .attention import attention, attention_varlen, attention_varlen_separate
from .attention_dropout import attention_dropout_mask
from .backend import use_backend
from .bias_gelu import FusedLinearGELU, bias_gelu
from .cross_entropy_rows import cross_entropy
from .dropout import dropout_mask
from .embed_layernorm import embed_layernorm
from .layernorm import FusedDropoutAddLayerNorm, FusedLayerNorm, FusedRMSNorm, dropout_add_layernorm, layernorm, rmsnorm
from .mlm_loss import masked_lm_loss

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
