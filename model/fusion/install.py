"""`fuse` puts the kernels into a model of another library; `unfuse` removes them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .attention_interface import NAME
from .masked_lm import MaskedLanguageModel, defer_decoder, restore_decoder
from .norms import FusedNorm, FusedPostNorm, FusedRMSNorm
from .report import FuseReport, Left, Replaced
from .swap import Fused, restore_class, swap_class
from .torch_nn import FusedEncoder, FusedEncoderLayer, FusedMultiheadAttention
from .transformers import attention_plan, pretrained_models, restore_attention, set_attention
from .transformers4 import FusedSelfAttention, PaddingMaskModel
from .unpad import PackedEncoder, PackedModel, padding_reader, unregistered, unwatch_labels, watch_labels


def fuse(
    model: nn.Module, *, attention: bool = True, layernorm: bool = True, mlm_loss: bool = False, unpad: bool = False
) -> FuseReport:
    """Put the kernels into ``model``, in place. Parameters, ``state_dict`` and results stay the same.

    Works on Transformers' encoders (docs/drop-in.md lists the families that are tested), PyTorch's
    ``nn.TransformerEncoder``, its layers and ``nn.MultiheadAttention``, and any module that contains one of these or a
    LayerNorm. Call it before ``torch.compile``, DDP or FSDP. Fusing again changes nothing.

    Results are equal up to rounding, except: a query with no real key gets zeros; a LayerNorm under autocast returns
    its input's dtype, where PyTorch returns float32; dropout draws other masks.

    Args:
        attention: fuse attention. A Transformers model gets ``attn_implementation="fusebert"`` (see
            `register_attention`) on a copy of its config, so that other models with the same config do not change.
        layernorm: fuse RMSNorms and LayerNorms, these with the dropout and the residual before them at the end of a
            post-LN sub-layer.
        mlm_loss: in training, compute the masked-language loss of the models in `families.MASKED_LMS` on the labelled
            rows only. The output then has a loss (float32) and *no logits*. Nothing changes in eval, without labels,
            and when labels are a positional argument.
        unpad: remove the padding of each batch before the layers, where the encoder is in `families` (see
            `register_family`). After them the rows of padding are zeros. Synchronises with the device. The batch stays
            padded where a row of padding is read (see `unpad`), when hidden states or attentions are recorded, under
            ``torch.compile``, and where packing would save less than it costs.

    Returns:
        What was replaced and what was left, with reasons.

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
            reason = template.obstacle(module) or template.touched(module)
        if reason is None:
            swap_class(module, template)
        note(name, module, template.by, reason)

    def swap_all(template: type[Fused], skip: Collection[nn.Module] = ()) -> None:
        for name, module in modules:
            if template.matches(module) and module not in skip:
                swap(name, module, template)

    if attention:
        swap_all(FusedSelfAttention)
        swap_all(PaddingMaskModel)
        for name, hf_model in pretrained:
            if any(map(PaddingMaskModel.matches, hf_model.modules())):
                continue
            for path, part, reason in attention_plan(name, hf_model):
                previous = set_attention(part) if reason is None else ""
                note(path, part, f"attn_implementation {NAME!r}, was {previous!r}", reason)
        swap_all(FusedMultiheadAttention)
    if layernorm:
        swap_all(FusedPostNorm)
        swap_all(FusedNorm, skip={module.LayerNorm for _, module in modules if isinstance(module, FusedPostNorm)})
        swap_all(FusedRMSNorm)
    if attention:
        swap_all(FusedEncoderLayer)
        swap_all(FusedEncoder)
    if unpad:
        padded: set[nn.Module] = set()
        for name, hf_model in pretrained:
            reason = padding_reader(hf_model)
            if reason is not None:
                padded.update(hf_model.modules())
                note(name, hf_model, "", f"unpad: {reason}")
        swap_all(PackedEncoder, skip=padded)
        swap_all(PackedModel, skip=padded)
        for _, hf_model in pretrained:
            watch_labels(hf_model)
        supported = any(PackedEncoder.matches(module) or PackedModel.matches(module) for _, module in modules)
        unknown = [entry for name, hf_model in pretrained for entry in unregistered(name, hf_model)]
        if not supported and not unknown:
            unknown = [("", model, "unpad does not support its encoder")]
        for name, module, reason in unknown:
            note(name, module, "", reason)
    if mlm_loss:
        for name, hf_model in pretrained:
            swap(name, hf_model, MaskedLanguageModel)
            defer_decoder(hf_model)
    return FuseReport(tuple(replaced), tuple(left))


def unfuse(model: nn.Module) -> None:
    """Undo every `fuse` of ``model``, in place: classes and attention implementations are restored."""
    for module in list(model.modules()):
        restore_attention(module)
        restore_decoder(module)
        unwatch_labels(module)
        restore_class(module)
