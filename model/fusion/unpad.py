"""Remove the padding of a batch before a Transformers encoder's layers and put it back, as zeros, after them.

The real rows of [B, N, H] become one row of segments, [1, T, H]. The layers pass ``cu_seq_lens_q`` and ``max_length_q``
to `attention_interface`, which attends within segments. Computing T synchronises with the device once a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_interface import NAME
from .swap import Fused, original_class_name

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
        rows = None if others else _real_rows(self, mask, kwargs)  # [T]
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
        rows = _real_rows(self, attention_mask, kwargs)  # [T]
        if rows is None or (input_ids is None) == (inputs_embeds is None):
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


def _real_rows(module: Any, mask: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Indices of the real rows in the flattened batch, [T]; None where the batch must stay padded."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or torch.compiler.is_compiling():
        return None  # T is not known in a compiled graph
    config = _config(module)
    if any(kwargs.get(name) or getattr(config, name) for name in RECORDED):
        return None  # a recorded layer would show packed rows
    rows = mask.flatten().nonzero().squeeze(-1)
    return rows if rows.numel() else None


def _segments(mask: Tensor) -> dict[str, Any]:
    """The arguments that describe the packed row of a padding mask [B, N]."""
    cu_seqlens = F.pad((mask != 0).sum(1).cumsum(0), (1, 0)).to(torch.int32)  # [B + 1]
    return {"cu_seq_lens_q": cu_seqlens, "max_length_q": mask.shape[1]}


def _padded(real: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """[B, N, H] from the real rows [1, T, H], zeros elsewhere."""
    flat = real.new_zeros(mask.numel(), real.shape[-1]).index_copy(0, rows, real[0])  # [B·N, H]
    return flat.view(*mask.shape, -1)
