"""LayerNorm and RMSNorm, alone and after dropout and a residual. README.md has the equations."""

from .api import FusedDropoutAddLayerNorm, FusedLayerNorm, FusedRMSNorm, dropout_add_layernorm, layernorm, rmsnorm

__all__ = [
    "FusedDropoutAddLayerNorm",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "dropout_add_layernorm",
    "layernorm",
    "rmsnorm",
]
