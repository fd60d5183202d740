"""Find the Transformers models in a module and set their attention implementation."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from typing import Any

from torch import nn

from .attention_interface import NAME, register_attention

# Attribute of each module with a config in a fused model: the attention implementation that the config named before.
PREVIOUS_ATTENTION = "_fusebert_previous_attention"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what the forward of a layer calls Transformers' attention interface


def pretrained_models(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """The outermost Transformers models in ``modules``, found without importing transformers."""
    found = [(name, module) for name, module in modules if _is_pretrained(module)]
    parts = {part for _, model in found for part in model.modules() if part is not model}
    return [(name, model) for name, model in found if model not in parts]


def _is_pretrained(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


@functools.cache
def uses_interface(cls: Any) -> bool:
    """Whether a class takes its attention function from Transformers' interface."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and INTERFACE in code.co_names


def _attention_layers(model: nn.Module) -> list[Any]:
    modules: list[Any] = list(model.modules())
    return [module for module in modules if uses_interface(module.__class__)]


def _configured(model: nn.Module) -> list[Any]:
    """The modules that hold a Transformers config: models and their attention layers."""
    return [module for module in model.modules() if hasattr(vars(module).get("config"), "_attn_implementation")]


def attention_plan(name: str, model: Any) -> list[tuple[str, Any, str | None]]:
    """(path, model, obstacle or None) of the largest models in ``model`` for which `set_attention` can be used.

    ``model`` itself where there is no obstacle, or where no model inside it (of an encoder-decoder, for example) can.
    """
    obstacle = attention_obstacle(model)
    if obstacle is None:
        return [(name, model, None)]
    inner = pretrained_models([(path, module) for path, module in model.named_modules() if module is not model])
    plans = [plan for path, part in inner for plan in attention_plan(f"{name}.{path}".lstrip("."), part)]
    return plans if any(reason is None for _, _, reason in plans) else [(name, model, obstacle)]


def attention_obstacle(model: Any) -> str | None:
    """The reason why `set_attention` cannot be used on ``model``, or None."""
    layers = _attention_layers(model)
    if not layers or not all(hasattr(vars(layer).get("config"), "_attn_implementation") for layer in layers):
        return "its attention does not go through Transformers' attention interface"
    if not (getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)):
        return "its class supports eager attention only"
    if attention_is_set(model):
        return f"attn_implementation is {NAME!r} already"
    if any(map(_is_causal, model.modules())):
        return "its attention is causal"
    if any("forward" in vars(layer) for layer in layers):
        return "the forward of an attention layer was replaced on the instance"
    if model.config.output_attentions:
        return "its config requests the attention weights (output_attentions)"
    return None


def _is_causal(module: Any) -> bool:
    """Whether an attention is causal. ``is_causal=False`` in its config makes a decoder bidirectional."""
    config = vars(module).get("config")
    return getattr(module, "is_causal", False) is True and getattr(config, "is_causal", True) is not False


def set_attention(model: Any) -> str:
    """Set attn_implementation="fusebert" on ``model`` and return the previous name.

    The name is set on the config of every module: a layer may read another object than the model around it, in which
    the masks are made. Configs are copied, because modules outside ``model`` may share them.
    """
    register_attention()
    copies: dict[int, Any] = {}
    previous = model.config._attn_implementation
    for module in _configured(model):
        module.config = copy.deepcopy(module.config, copies)
    for module in _configured(model):
        vars(module)[PREVIOUS_ATTENTION] = module.config._attn_implementation
    for module in _configured(model):
        _set_name(module.config, NAME)
    return previous


def attention_is_set(model: nn.Module) -> bool:
    """Whether every module with a config names the kernels in it."""
    return all(module.config._attn_implementation == NAME for module in _configured(model))


def _set_name(config: Any, name: str) -> None:
    config._attn_implementation_internal = name  # the public attribute also sets the configs inside this one


def restore_attention(module: Any) -> None:
    """Undo `set_attention` for one module. Does nothing if it was not called."""
    name = vars(module).pop(PREVIOUS_ATTENTION, None)
    if name is not None and module.config._attn_implementation == NAME:
        _set_name(module.config, name)
