"""Three embeddings, LayerNorm and dropout in one kernel. README.md has the equations."""

from .api import embed_layernorm

__all__ = ["embed_layernorm"]
