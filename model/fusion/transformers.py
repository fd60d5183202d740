"""Whole Transformers models for `fuse`: their attention and their masked-language loss."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import masked_lm_loss
from .attention_interface import NAME, register_attention
from .torch_nn import Fused

# Left on a Transformers model: the attention implementation that each of its sub-models had.
PREVIOUS_ATTENTION = "_fusebert_previous_attention"
# The name under which a model returns the logits, for the models whose loss is known: the mean cross entropy over the
# labels that are not IGNORE_INDEX.
MLM_LOGITS = {
    "BertForMaskedLM": "logits",
    "BertForPreTraining": "prediction_logits",
    "CamembertForMaskedLM": "logits",
    "DistilBertForMaskedLM": "logits",
    "ElectraForMaskedLM": "logits",
    "ModernBertForMaskedLM": "logits",
    "RobertaForMaskedLM": "logits",
    "XLMRobertaForMaskedLM": "logits",
}
IGNORE_INDEX = -100


def pretrained_models(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """The Transformers models in ``modules`` that are not part of another; without importing transformers."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return []
    found = [(name, module) for name, module in modules if isinstance(module, transformers.PreTrainedModel)]
    parts = {part for _, model in found for part in model.modules() if part is not model}
    return [(name, model) for name, model in found if model not in parts]


# ------------------------------------------------------------------------------------------------------------ attention


def why_not_attention(model: Any) -> str | None:
    if model.config._attn_implementation == NAME:
        return f"attn_implementation is {NAME!r} already"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return "its attention does not go through Transformers' attention interface"
    if any(getattr(module, "is_causal", False) is True for module in model.modules()):
        return "its attention is causal"
    if model.config.output_attentions:
        return "its config asks for the attention weights (output_attentions)"
    return None


def set_attention(model: Any) -> str:
    """Give ``model`` our attn_implementation, and return the one it had.

    On a copy of its config, one for all of its modules: other models may have been built from the same.
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
    """Undo `set_attention`; nothing where there is nothing to undo."""
    for name, implementation in vars(model).pop(PREVIOUS_ATTENTION, {}).items():
        model.get_submodule(name).config._attn_implementation = implementation


# -------------------------------------------------------------------------------------------- masked-language modelling


class DeferredDecoder(Fused):
    """The output embeddings of a masked-language model. While ``deferred`` they hand their input on."""

    by = "masked_lm_loss"
    deferred: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if type(module) is nn.Linear else "its output embeddings are not nn.Linear"

    def forward(self: Any, input: Tensor) -> Tensor:
        return input if self.deferred else self.original.forward(self, input)


class MaskedLanguageModel(Fused):
    """In training, with labels: the loss by `masked_lm_loss`, and no logits."""

    by = "masked_lm_loss on the labelled rows; while training its output has no logits"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if type(module).__name__ not in MLM_LOGITS or not type(module).__module__.startswith("transformers.models."):
            return f"its loss is not one that fuse knows ({', '.join(MLM_LOGITS)})"
        if getattr(module.config, "sparse_pred_ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
            return f"its config ignores labels other than {IGNORE_INDEX}"
        return DeferredDecoder.why_not(module.get_output_embeddings())

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind, decoder = type(self).__name__, self.get_output_embeddings()
        targets = ("labels", "next_sentence_label") if kind == "BertForPreTraining" else ("labels",)
        given = all(kwargs.get(name) is not None for name in targets)
        if not self.training or not given or not hasattr(decoder, "deferred"):
            return self.original.forward(self, *args, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in (*targets, "return_dict")}
        decoder.deferred = True
        try:
            output = self.original.forward(self, *args, **others, return_dict=True)
        finally:
            decoder.deferred = False
        fields = dict(output.items())
        hidden = fields.pop(MLM_LOGITS[kind]).flatten(0, -2)
        labels = kwargs["labels"].to(hidden.device).flatten()
        if not torch.compiler.is_compiling():  # a compiled graph knows every shape: all rows meet the vocabulary there
            rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
            hidden, labels = hidden[rows], labels[rows]
        # ModernBERT's loss heeds the trainer's count of labels in all batches of a step; the others' means do not.
        items = kwargs.get("num_items_in_batch") if kind == "ModernBertForMaskedLM" else None
        reduction = "mean" if items is None else "sum"
        loss: Any = masked_lm_loss(hidden, decoder.weight, decoder.bias, labels, reduction=reduction)
        if items is not None:
            loss = loss / items
        if kind == "BertForPreTraining":
            pairs = fields["seq_relationship_logits"].view(-1, 2)
            loss = loss + F.cross_entropy(pairs, kwargs["next_sentence_label"].view(-1))
        output = type(output)(loss=loss, **fields)
        return output if kwargs.get("return_dict", getattr(self.config, "return_dict", True)) else output.to_tuple()
