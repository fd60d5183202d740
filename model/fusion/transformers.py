"""Find the Transformers models in a module and set their attention implementation."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from .attention_interface import NAME, register_attention

# Attribute of a fused Transformers model: the attention implementation that each of its sub-models had.
PREVIOUS_ATTENTION = "_fusebert_previous_attention"


def pretrained_models(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """The outermost Transformers models in ``modules``, found without importing transformers."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return []
    found = [(name, module) for name, module in modules if isinstance(module, transformers.PreTrainedModel)]
    parts = {part for _, model in found for part in model.modules() if part is not model}
    return [(name, model) for name, model in found if model not in parts]


def attention_obstacle(model: Any) -> str | None:
    """The reason why `set_attention` cannot be used on ``model``, or None."""
    if model.config._attn_implementation == NAME:
        return f"attn_implementation is {NAME!r} already"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return "its attention does not go through Transformers' attention interface"
    if any(getattr(module, "is_causal", False) is True for module in model.modules()):
        return "its attention is causal"
    if model.config.output_attentions:
        return "its config requests the attention weights (output_attentions)"
    return None


def set_attention(model: Any) -> str:
    """Set attn_implementation="fusebert" on ``model`` and return the previous name.

    The modules get one common copy of their config, because other models may share the original.
    """
    register_attention()
    transformers: Any = sys.modules["transformers.modeling_utils"]
    copies: dict[int, Any] = {}
    previous = {}
    for name, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            previous[name] = module.config._attn_implementation
        if hasattr(vars(module).get("config"), "_attn_implementation"):
            module.config = copy.deepcopy(module.config, copies)
    vars(model)[PREVIOUS_ATTENTION] = previous
    model.set_attn_implementation(NAME)
    return previous[""]


def restore_attention(model: Any) -> None:
    """Undo `set_attention`. Does nothing if it was not called on ``model``."""
    for name, implementation in vars(model).pop(PREVIOUS_ATTENTION, {}).items():
        model.get_submodule(name).config._attn_implementation = implementation
