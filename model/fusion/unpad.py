"""Remove the padding of a batch before a Transformers encoder's layers and put it back, as zeros, after them.

The real rows of [B, N, H] become one row of segments, [1, T, H]. The layers pass ``cu_seq_lens_q`` and ``max_length_q``
to `attention_interface`, which attends within segments. Computing T synchronises with the device.

A batch stays padded where a row of padding is read: as the first token of a left-padded sequence, by a hook or a
replaced forward between the layers, by a label on padding, or by a head that `padding_reader` knows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import IGNORE
from .attention_interface import NAME
from .swap import CALL_HOOKS, Fused, original_class_name
from .transformers import uses_interface

# Encoders that add positions before their layers, which are then independent of a row's place in the batch.
PACKABLE = (
    "transformers.models.bert.modeling_bert.BertEncoder",
    "transformers.models.camembert.modeling_camembert.CamembertEncoder",
    "transformers.models.distilbert.modeling_distilbert.Transformer",
    "transformers.models.electra.modeling_electra.ElectraEncoder",
    "transformers.models.roberta.modeling_roberta.RobertaEncoder",
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder",
)
MODERNBERT = "transformers.models.modernbert.modeling_modernbert.ModernBertModel"
RECORDED = ("output_hidden_states", "output_attentions")
ROW_BY_ROW = ("torch", "transformers")  # hooks of these packages (FSDP2, pruning, recorded outputs) take packed rows


def padding_reader(model: nn.Module) -> str | None:
    """The reason why the padding of ``model``'s encoder is read after it, or None."""
    for module in model.modules():
        if type(module).__name__.endswith("ForQuestionAnswering"):
            return "the softmax of its head includes the rows of padding"
        if getattr(module, "summary_type", "first") != "first":
            return f"its head reads the rows of padding (summary_type {module.summary_type!r})"
    return None


def watch_labels(model: nn.Module) -> None:
    """Keep the padding of a batch with labels on padding: the loss of ``model`` reads those rows."""
    if "labels" in inspect.signature(model.forward).parameters and _keep_labelled not in _pre_hooks(model).values():
        model.register_forward_pre_hook(_keep_labelled, with_kwargs=True)


def unwatch_labels(module: nn.Module) -> None:
    """Undo `watch_labels`, for ``module`` as the model or as its packed encoder."""
    for key in [key for key, hook in _pre_hooks(module).items() if hook is _keep_labelled]:
        del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    vars(module).pop("keeps_padding", None)


def _pre_hooks(module: nn.Module) -> dict[int, Any]:
    return module._forward_pre_hooks


def _keep_labelled(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # stays padded
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    labels, mask = given.get("labels"), given.get("attention_mask")
    found = False
    if isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape:
        found = bool(((labels != IGNORE) & (mask.to(labels.device) == 0)).any())
    for part in model.modules():
        if isinstance(part, _Packed) and found != getattr(part, "keeps_padding", False):
            part.keeps_padding = found  # type: ignore[assignment]


def _is_row_by_row(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).split(".")[0] in ROW_BY_ROW


class _Packed(Fused):
    by = "packed: padding is removed before the layers and comes back as zeros"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        config = _config(module)
        if config._attn_implementation != NAME:
            return f"its attn_implementation is not {NAME!r}"
        if getattr(config, "chunk_size_feed_forward", 0):
            return "its feed-forward processes chunks of the sequence (chunk_size_feed_forward)"
        return None

    @classmethod
    def touched(cls, module: Any) -> str | None:
        if torch.compiler.is_compiling():
            return None  # a compiled batch stays padded
        attentions = 0
        part: Any
        for part in module.modules():
            own = part.__dict__
            if getattr(own.get("config"), "_attn_implementation", NAME) != NAME:
                return f"its attn_implementation is not {NAME!r}"
            attentions += uses_interface(part.__class__)
            if part is module:
                continue
            if "forward" in own:
                return f"the forward of its {type(part).__name__} was replaced on the instance"
            if any(not _is_row_by_row(hook) for name in CALL_HOOKS for hook in own[name].values()):
                return f"its {type(part).__name__} has hooks, which would see packed rows"
        layers = getattr(module, "layer", None) or module.layers
        return None if attentions == len(layers) else "its attention is of another kind"


class PackedEncoder(_Packed):
    """One of `PACKABLE`."""

    @staticmethod
    def matches(module: Any) -> bool:
        return original_class_name(module) in PACKABLE

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask: Any = kwargs.get("attention_mask")
        others = args or any(
            kwargs.get(name) is not None for name in ("encoder_hidden_states", "cache", "past_key_values")
        )
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool:
            mask = mask[:, 0, 0]  # [B, N]
        rows = None if others else _real_rows(self, mask, hidden_states.shape[:2], kwargs)  # [T]
        if rows is None:
            return self.original.forward(self, hidden_states, *args, **kwargs)
        kwargs |= {"attention_mask": None, **_segments(mask)}
        output = self.original.forward(self, hidden_states.flatten(0, 1)[rows][None], **kwargs)
        output.last_hidden_state = _padded(output.last_hidden_state, rows, mask)
        return output


class PackedModernBert(_Packed):
    """ModernBERT. Its layers rotate by ``position_ids``, so it is packed from the tokens on, with their positions."""

    @staticmethod
    def matches(module: Any) -> bool:
        return original_class_name(module) == MODERNBERT

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        one = (input_ids is None) != (inputs_embeds is None)
        rows = _real_rows(self, attention_mask, given.shape[:2], kwargs, window=True) if one else None  # [T]
        if rows is None:
            return self.original.forward(self, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        if position_ids is None:
            position_ids = torch.arange(attention_mask.shape[1], device=rows.device)
        return_dict = kwargs.pop("return_dict", None)
        output = self.original.forward(
            self,
            input_ids=None if input_ids is None else input_ids.flatten()[rows][None],
            attention_mask=dict.fromkeys(self.config.layer_types),  # no masks: layers have their window
            position_ids=position_ids.expand(attention_mask.shape).flatten()[rows][None],
            inputs_embeds=None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[rows][None],
            return_dict=True,
            **_segments(attention_mask),
            **kwargs,
        )
        output.last_hidden_state = _padded(output.last_hidden_state, rows, attention_mask)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _config(encoder: Any) -> Any:
    return encoder.config if hasattr(encoder, "config") else encoder.layer[0].attention.config


def _real_rows(
    module: Any, mask: Any, shape: tuple[int, ...], kwargs: dict[str, Any], window: bool = False
) -> Tensor | None:
    """Indices of the real rows in the flattened batch, [T]; None where the batch must stay padded.

    Args:
        mask: [B, N] for a batch of this ``shape``, which may be packed, or anything else.
        window: whether the layers count the rows between two tokens, which a hole in the mask would change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or getattr(module, "keeps_padding", False):
        return None  # T is not known in a compiled graph
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != shape:
        return None
    config = _config(module)
    if any(kwargs.get(name) or getattr(config, name) for name in RECORDED):
        return None  # a recorded layer would show packed rows
    real = mask != 0
    as_padded = real[:, 0].all()  # the first token is read: by poolers and classifiers
    if window:
        as_padded &= ~(real[:, 1:] & ~real[:, :-1]).any()
    return real.flatten().nonzero().squeeze(-1) if as_padded else None


def _segments(mask: Tensor) -> dict[str, Any]:
    """The arguments that describe the packed row of a padding mask [B, N]."""
    cu_seqlens = F.pad((mask != 0).sum(1).cumsum(0), (1, 0)).to(torch.int32)  # [B + 1]
    return {"cu_seq_lens_q": cu_seqlens, "max_length_q": mask.shape[1]}


def _padded(real: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """[B, N, H] from the real rows [1, T, H], zeros elsewhere."""
    flat = real.new_zeros(mask.numel(), real.shape[-1]).index_copy(0, rows, real[0])  # [B·N, H]
    return flat.view(*mask.shape, -1)
