"""`fuse`: the kernels inside someone else's model, without changing what it computes.

What is fused, and how, is in `fused` (LayerNorms, PyTorch's encoders) and `fused_hf` (Transformers models); here are
the one call, its inverse and its report.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention_interface import NAME
from .torch_nn import (
    Fused,
    FusedEncoder,
    FusedEncoderLayer,
    FusedMultiheadAttention,
    FusedNorm,
    FusedPostNorm,
    restore_class,
    swap_class,
)
from .transformers import (
    DeferredDecoder,
    MaskedLanguageModel,
    pretrained_models,
    restore_attention,
    set_attention,
    why_not_attention,
)
from .transformers4 import FusedMaskModel, FusedSelfAttention
from .unpad import PackedEncoder, PackedModernBert


@dataclass(frozen=True)
class Replaced:
    """One module that `fuse` changed. name: its path in the model ("" for the model). by: what it runs now."""

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class Left:
    """One module that `fuse` looked at and left as it was, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What one call of `fuse` did; ``print`` it."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"fusebert: {len(self.replaced)} modules fused, {len(self.left)} left as they were"]
        lines += _table("fused", [(entry.kind, entry.by, entry.name) for entry in self.replaced])
        lines += _table("left", [(entry.kind, entry.reason, entry.name) for entry in self.left])
        return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    """A line for each (kind, text), how often it occurs, and the first place."""
    first: dict[tuple[str, str], str] = {}
    for kind, text, name in rows:
        first.setdefault((kind, text), name or "the model itself")
    counts = Counter((kind, text) for kind, text, _ in rows)
    return [
        f"  {title} {count:4d} × {kind}: {text} ({'' if count == 1 else 'first: '}{first[kind, text]})"
        for (kind, text), count in counts.items()
    ]


def fuse(
    model: nn.Module, *, attention: bool = True, layernorm: bool = True, mlm_loss: bool = False, unpad: bool = False
) -> FuseReport:
    """Put the kernels into ``model``, in place; parameters, ``state_dict`` and results stay what they were.

    For Transformers' encoders (BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT, ViT, and others built alike), PyTorch's
    ``nn.TransformerEncoder``, its layers and ``nn.MultiheadAttention``, and whatever holds one of them or a LayerNorm.
    Fuse before ``torch.compile``, DDP or FSDP. Fusing again changes nothing.

    Results are equal up to rounding, except: a query whose keys are all padding gets zeros; a LayerNorm under autocast
    returns its input's dtype, where PyTorch returns float32; dropout draws other masks.

    Args:
        attention: fuse attention. A Transformers model gets ``attn_implementation="fusebert"`` (`register_attention`
            tells what that does) on a copy of its config, so that other models built from the same keep theirs.
        layernorm: fuse LayerNorms, with the dropout and the residual before them where they end a post-LN sub-layer.
        mlm_loss: in training, compute the masked-language loss of the models in `fused_hf.MLM_LOGITS` on the labelled
            rows alone. The output then has a loss (float32) and *no logits*, so it is not done unasked. In eval,
            without labels, and with labels as a positional argument, nothing changes.
        unpad: take the padding out of each batch before the layers, where the encoder is one of
            `fused_unpad.PACKABLE` or ModernBERT; behind them the rows of padding are zeros (so a label on padding,
            which should be −100, gives another loss). Costs one wait for the device a batch. With recorded hidden
            states or attentions, and under ``torch.compile``, the batch stays padded.

    Returns:
        What was replaced and what was left, and why.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    modules = list(model.named_modules())
    pretrained = pretrained_models(modules)
    replaced: list[Replaced] = []
    left: list[Left] = []

    def note(name: str, module: nn.Module, by: str, reason: str | None) -> None:
        kind = type(module).__name__
        if reason is None:
            replaced.append(Replaced(name, kind, by))
        else:
            left.append(Left(name, kind, reason))

    def swap(name: str, module: nn.Module, template: type[Fused]) -> None:
        if isinstance(module, Fused):
            reason: str | None = "fused already"
        elif "forward" in vars(module):
            reason = "its forward was replaced on the instance"
        else:
            reason = template.why_not(module)
        if reason is None:
            swap_class(module, template)
        note(name, module, template.by, reason)

    def swap_all(kind: Any, template: type[Fused]) -> None:
        for name, module in modules:
            if isinstance(module, kind) and module not in inside:
                swap(name, module, template)

    def swap_found(template: Any) -> None:
        for name, module in modules:
            if template.is_one(module):
                swap(name, module, template)

    inside: set[Any] = set()  # norms whose work is done by the module around them
    if attention:
        swap_found(FusedSelfAttention)
        swap_found(FusedMaskModel)
        for name, hf_model in pretrained:
            if any(map(FusedMaskModel.is_one, hf_model.modules())):
                continue
            reason = why_not_attention(hf_model)
            was = set_attention(hf_model) if reason is None else ""
            note(name, hf_model, f"attn_implementation {NAME!r}, was {was!r}", reason)
        swap_all(nn.MultiheadAttention, FusedMultiheadAttention)
    if layernorm:
        swap_found(FusedPostNorm)
        inside = {module.LayerNorm for _, module in modules if isinstance(module, FusedPostNorm)}
        swap_all(nn.LayerNorm, FusedNorm)
    if attention:
        swap_all(nn.TransformerEncoderLayer, FusedEncoderLayer)
        swap_all(nn.TransformerEncoder, FusedEncoder)
    if unpad:
        swap_found(PackedEncoder)
        swap_found(PackedModernBert)
        if not any(PackedEncoder.is_one(module) or PackedModernBert.is_one(module) for _, module in modules):
            note("", model, "", "unpad: it has no encoder that fuse can pack")
    if mlm_loss:
        for name, hf_model in pretrained:
            swap(name, hf_model, MaskedLanguageModel)
            decoder = hf_model.get_output_embeddings()
            if isinstance(hf_model, MaskedLanguageModel) and not isinstance(decoder, DeferredDecoder):
                swap_class(decoder, DeferredDecoder)
                decoder.deferred = False
    return FuseReport(tuple(replaced), tuple(left))


def unfuse(model: nn.Module) -> None:
    """Undo every `fuse` of ``model``, in place: modules get their class back, Transformers models their attention."""
    for module in list(model.modules()):
        restore_attention(module)
        if isinstance(module, DeferredDecoder):
            del module.deferred
        restore_class(module)
