"""The loss of Transformers' masked-language models on the labelled rows only, without the logits of all positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import masked_lm_loss
from ..batch import IGNORE
from .swap import Fused, swap_class, why_touched

# Models with a known loss (mean cross entropy over the labels that are not IGNORE) → the name of their logits.
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


class DeferredDecoder(Fused):
    """The output embeddings of a masked-language model. While ``deferred`` is set, forward returns its input."""

    by = "masked_lm_loss"
    deferred: Any

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_touched(module, nn.Linear, "output embedding")

    def forward(self: Any, input: Tensor) -> Tensor:
        return input if self.deferred else self.original.forward(self, input)


class MaskedLanguageModel(Fused):
    """A model of `MLM_LOGITS`. In training, with labels, it returns the loss by `masked_lm_loss` and no logits."""

    by = "masked_lm_loss on the labelled rows; while training its output has no logits"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if type(module).__name__ not in MLM_LOGITS or not type(module).__module__.startswith("transformers.models."):
            return f"mlm_loss does not support its class; it supports {', '.join(MLM_LOGITS)}"
        if getattr(module.config, "sparse_pred_ignore_index", IGNORE) != IGNORE:
            return f"its config ignores labels other than {IGNORE}"
        return DeferredDecoder.obstacle(module.get_output_embeddings())

    @classmethod
    def touched(cls, module: Any) -> str | None:
        return DeferredDecoder.obstacle(module.get_output_embeddings())

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind, decoder = type(self).__name__, self.get_output_embeddings()
        targets = ("labels", "next_sentence_label") if kind == "BertForPreTraining" else ("labels",)
        given = all(kwargs.get(name) is not None for name in targets)
        if not self.training or not given or "deferred" not in vars(decoder):
            return self.original.forward(self, *args, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in (*targets, "return_dict")}
        decoder.deferred = True
        try:
            output = self.original.forward(self, *args, **others, return_dict=True)
        finally:
            decoder.deferred = False
        fields = dict(output.items())
        hidden = fields.pop(MLM_LOGITS[kind]).flatten(0, -2)  # [B·N, H]
        labels = kwargs["labels"].to(hidden.device).flatten()  # [B·N]
        if not torch.compiler.is_compiling():  # a compiled graph has static shapes: it computes the loss of all rows
            rows = (labels != IGNORE).nonzero().squeeze(-1)  # [M]
            hidden, labels = hidden[rows], labels[rows]  # [M, H], [M]
        # ModernBERT divides by the trainer's count of labels in all batches of a step; the other models do not.
        items = kwargs.get("num_items_in_batch") if kind == "ModernBertForMaskedLM" else None
        reduction = "mean" if items is None else "sum"
        loss: Any = masked_lm_loss(hidden, decoder.weight, decoder.bias, labels, reduction=reduction)
        if items is not None:
            loss = loss / items
        if kind == "BertForPreTraining":
            pairs = fields["seq_relationship_logits"].view(-1, 2)  # [B, 2]
            loss = loss + F.cross_entropy(pairs, kwargs["next_sentence_label"].view(-1))
        output = type(output)(loss=loss, **fields)
        return output if kwargs.get("return_dict", getattr(self.config, "return_dict", True)) else output.to_tuple()


def defer_decoder(model: Any) -> None:
    """Prepare the output embeddings of ``model`` if it is a `MaskedLanguageModel`."""
    decoder = model.get_output_embeddings()
    if isinstance(model, MaskedLanguageModel) and not isinstance(decoder, DeferredDecoder):
        swap_class(decoder, DeferredDecoder)
        decoder.deferred = False


def restore_decoder(module: nn.Module) -> None:
    """Undo `defer_decoder` on the output embeddings. Does nothing on other modules."""
    if isinstance(module, DeferredDecoder):
        del module.deferred
