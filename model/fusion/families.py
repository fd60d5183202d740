"""The classes that `fuse` must know by name: encoders that can be packed, and heads with a known loss.

Everything else is recognised: attention by Transformers' interface, norms by their class or code.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from .swap import class_name


def _paths(*rows: str) -> list[str]:
    """``package.module.Class`` of each word after the first, which is the file of Transformers that has them."""
    found = []
    for row in rows:
        file, *classes = row.split()
        folder, _, module = file.rpartition("/")
        found += [f"transformers.models.{folder or module}.modeling_{module}.{name}" for name in classes]
    return found


# Encoders that take hidden states [B, N, H] and a padding mask. Positions are added before, or passed for each row.
ENCODERS = set(
    _paths(
        "albert AlbertTransformer",
        "bert BertEncoder",
        "bert_generation BertEncoder",
        "camembert CamembertEncoder",
        "data2vec/data2vec_text Data2VecTextEncoder",
        "distilbert Transformer",
        "electra ElectraEncoder",
        "ernie ErnieEncoder",
        "esm EsmEncoder",
        "layoutlm LayoutLMEncoder",
        "roberta RobertaEncoder",
        "roberta_prelayernorm RobertaPreLayerNormEncoder",
        "roc_bert RoCBertEncoder",
        "xlm_roberta XLMRobertaEncoder",
        "xlm_roberta_xl XLMRobertaXLEncoder",
    )
)
# Models that hold their layers themselves and rotate queries and keys by ``position_ids``.
MODELS = set(
    _paths(
        "eurobert EuroBertModel",
        "llama LlamaModel",
        "modernbert ModernBertModel",
        "nomic_bert NomicBertModel",
        "ultrabert UltrabertModel",
    )
)
# Masked-language models → the name of their logits. Loss: mean cross entropy over the labels that are not IGNORE.
MASKED_LMS = dict.fromkeys(
    _paths(
        "albert AlbertForMaskedLM",
        "bert BertForMaskedLM",
        "camembert CamembertForMaskedLM",
        "data2vec/data2vec_text Data2VecTextForMaskedLM",
        "deberta_v2 DebertaV2ForMaskedLM",
        "distilbert DistilBertForMaskedLM",
        "electra ElectraForMaskedLM",
        "ernie ErnieForMaskedLM",
        "esm EsmForMaskedLM",
        "eurobert EuroBertForMaskedLM",
        "layoutlm LayoutLMForMaskedLM",
        "megatron_bert MegatronBertForMaskedLM",
        "modernbert ModernBertForMaskedLM",
        "mpnet MPNetForMaskedLM",
        "nomic_bert NomicBertForMaskedLM",
        "roberta RobertaForMaskedLM",
        "roberta_prelayernorm RobertaPreLayerNormForMaskedLM",
        "roc_bert RoCBertForMaskedLM",
        "ultrabert UltrabertForMaskedLM",
        "xlm_roberta XLMRobertaForMaskedLM",
        "xlm_roberta_xl XLMRobertaXLForMaskedLM",
    ),
    "logits",
) | dict.fromkeys(
    _paths("bert BertForPreTraining", "ernie ErnieForPreTraining", "megatron_bert MegatronBertForPreTraining"),
    "prediction_logits",
)


def register_family(
    *, encoder: type | None = None, model: type | None = None, masked_lm: type | None = None, logits: str = "logits"
) -> None:
    """Name the classes of a model family that `fuse` does not know, for ``unpad=True`` and ``mlm_loss=True``.

    Attention and norms need no registration. Call it before `fuse`; each class can also be registered alone.
    Registering a class again changes nothing. All attention of a packed class must use Transformers' attention
    interface, and every other part must compute each row [H] alone: `fuse` checks the first, the caller the second.

    Args:
        encoder: class of the module; its forward takes hidden states [B, N, H] first and a padding mask second or as
            ``attention_mask``, and returns an output with ``last_hidden_state``, or a tuple that starts with it.
            Positions are added to the hidden states before, or passed as ``position_embeddings``.
        model: class of a model without such a module. Its forward takes ``input_ids`` or ``inputs_embeds``,
            ``attention_mask`` and ``position_ids``, and only its layers use the positions (rotary embeddings).
        masked_lm: class of a masked-language model. Its loss is the mean cross entropy of its logits over the labels
            that are not −100, and ``get_output_embeddings()`` the linear layer that makes the logits.
        logits: the name of its output's logits.

    Raises:
        TypeError: no class is given, or one is no subclass of ``nn.Module``.
        ValueError: the forward of ``model`` takes no ``position_ids``.
    """
    given = {"encoder": encoder, "model": model, "masked_lm": masked_lm}
    if not any(given.values()):
        raise TypeError("register_family needs a class: encoder=, model= or masked_lm=")
    for name, cls in given.items():
        if cls is not None and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"{name} must be a subclass of nn.Module; got {cls!r}")
    if model is not None and "position_ids" not in parameter_names(model):
        raise ValueError(
            f"model must take position_ids, which a packed batch needs; {model.__name__}.forward takes "
            f"{', '.join(parameter_names(model))}"
        )
    if encoder is not None:
        ENCODERS.add(class_name(encoder))
    if model is not None:
        MODELS.add(class_name(model))
    if masked_lm is not None:
        MASKED_LMS[class_name(masked_lm)] = logits


@functools.cache
def parameter_names(cls: Any) -> tuple[str, ...]:
    """The names of what ``cls.forward`` takes by position."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
