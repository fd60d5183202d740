"""The loss of Transformers' masked-language models on the labelled rows only, without the logits of all positions."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import masked_lm_loss
from ..batch import IGNORE
from .families import MASKED_LMS, parameter_names
from .swap import Fused, class_name, swap_class, why_touched


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
    """A model of `families.MASKED_LMS`. In training, with labels, it returns `masked_lm_loss` and no logits."""

    by = "masked_lm_loss on the labelled rows; while training its output has no logits"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if class_name(type(module)) not in MASKED_LMS:
            return "mlm_loss does not support its class; see register_family"
        if getattr(module.config, "sparse_pred_ignore_index", IGNORE) != IGNORE:
            return f"its config ignores labels other than {IGNORE}"
        if getattr(module, "sparse_prediction", False):
            return "it computes the logits of the labelled rows only (sparse_prediction)"
        return cls.touched(module)

    @classmethod
    def touched(cls, module: Any) -> str | None:
        decoder = module.get_output_embeddings()
        reason = DeferredDecoder.obstacle(decoder)
        if reason is None and decoder.out_features != module.config.vocab_size:
            return "its output embedding does not make the logits"
        return reason

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        decoder, known = self.get_output_embeddings(), parameter_names(self.original)
        targets = [name for name in ("labels", "next_sentence_label") if name in known]
        given = all(kwargs.get(name) is not None for name in targets)
        if not self.training or not given or "deferred" not in vars(decoder):
            return self.original.forward(self, *args, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in (*targets, "return_dict")}
        with _deferred(self, decoder) as bias:
            output = self.original.forward(self, *args, **others, return_dict=True)
        fields = dict(output.items())
        hidden = fields.pop(MASKED_LMS[class_name(type(self))]).flatten(0, -2)  # [B·N, H]
        labels = kwargs["labels"].to(hidden.device).flatten()  # [B·N]
        if not torch.compiler.is_compiling():  # a compiled graph has static shapes: it computes the loss of all rows
            rows = (labels != IGNORE).nonzero().squeeze(-1)  # [M]
            hidden, labels = hidden[rows], labels[rows]  # [M, H], [M]
        items = kwargs.get("num_items_in_batch") if _uses_loss_function(self.original) else None
        reduction = "mean" if items is None else "sum"
        loss: Any = masked_lm_loss(hidden, decoder.weight, bias, labels, reduction=reduction)
        if items is not None:
            loss = loss / items
        if "next_sentence_label" in targets:
            pairs = fields["seq_relationship_logits"].view(-1, 2)  # [B, 2]
            loss = loss + F.cross_entropy(pairs, kwargs["next_sentence_label"].view(-1))
        output = type(output)(loss=loss, **fields)
        return output if kwargs.get("return_dict", getattr(self.config, "return_dict", True)) else output.to_tuple()


@functools.cache
def _uses_loss_function(cls: Any) -> bool:
    """Whether the loss is divided by the trainer's count of labels in all batches of a step: it is in newer models."""
    return "loss_function" in inspect.unwrap(cls.forward).__code__.co_names


@contextlib.contextmanager
def _deferred(model: Any, decoder: Any) -> Iterator[Tensor | None]:
    """Within the block ``decoder`` returns its input. Yields the bias of the logits, [V] or None.

    ESM's head adds the bias after the decoder. Within the block it adds 0.
    """
    head = next(part for part in model.modules() if decoder in part._modules.values())
    late = None if decoder.bias is not None else head._parameters.get("bias")
    decoder.deferred = True
    if late is not None:
        head._parameters["bias"] = late.new_zeros(())
    try:
        yield decoder.bias if late is None else late
    finally:
        decoder.deferred = False
        if late is not None:
            head._parameters["bias"] = late


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
