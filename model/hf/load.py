"""Read a BERT from a Hugging Face folder or from a Transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..pretraining import BertForPreTraining
from .folder import check_settings, listed, read_settings, read_tensors
from .format import CONFIG_FILE, FIELDS, MLM_BIAS, WORD_EMBEDDINGS, parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Transformers omits a field from config.json when it has the default of its BertConfig.
HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# Copies that a file may have of tied parameters.
DECODER_BIAS = "cls.predictions.decoder.bias"
TIED_COPIES = {"cls.predictions.decoder.weight": WORD_EMBEDDINGS, DECODER_BIAS: MLM_BIAS}
# Heads that a checkpoint of the encoder alone, or of one task, may lack as a whole, and their tensors' prefixes.
HEADS: dict[str, tuple[str, ...]] = {
    "masked-language-model head": ("cls.predictions.",),
    "pooler": ("bert.pooler.",),
    "next-sentence head": ("cls.seq_relationship.",),
}


def from_hf(source: str | Path | PreTrainedModel) -> BertForPreTraining:
    """BERT from a Hugging Face checkpoint: float32 on the CPU, in training mode.

    A head that the checkpoint lacks as a whole (``BertModel`` and ``BertForMaskedLM`` have no next-sentence head) is
    initialised from torch's generator, with a warning that names it.

    Args:
        source: a folder with config.json and model.safetensors (or its shards and their index), or a BERT of the
            installed Transformers: ``BertForPreTraining``, ``BertForMaskedLM``, ``BertModel``.

    Raises:
        TypeError: ``source`` is neither.
        ValueError: the folder or a file is missing or damaged, the model is not a BERT of this arithmetic, or tensors
            are unknown, missing or of the wrong shape; the message lists them.
    """
    if isinstance(source, str | Path):
        directory = Path(source)
        if not directory.is_dir():
            raise ValueError(
                f"{directory} is not a folder. from_hf downloads nothing: fetch the model first, for example with "
                "`hf download NAME --local-dir FOLDER`, and give that folder"
            )
        where = str(directory)
        config = read_config(read_settings(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
        tensors = read_tensors(directory)
    elif isinstance(source, nn.Module) and hasattr(getattr(source, "config", None), "to_dict"):
        where = type(source).__name__
        config = read_config(source.config.to_dict(), f"{where}.config")
        tensors = source.state_dict()
    else:
        raise TypeError(f"source must be a folder or a Transformers model; got {type(source).__name__}")

    tensors, absent = checked(_renamed(tensors), config, where)
    if absent:
        warnings.warn(f"{where} has no {' and no '.join(absent)}: initialised at random", stacklevel=2)
    model = BertForPreTraining(config)
    parameters = dict(model.named_parameters())
    names = parameter_names(config.num_hidden_layers)
    with torch.no_grad():
        for ours, theirs in names.items():
            if theirs[0] in tensors:
                parameters[ours].copy_(torch.cat([tensors[part].to("cpu", torch.float32) for part in theirs]))
    return model


def read_config(settings: Mapping[str, Any], where: str) -> BertConfig:
    """The configuration that a config.json of a BERT states.

    Raises:
        ValueError: it is of another model, or of another arithmetic.
    """
    model_type = settings.get("model_type")
    if model_type != "bert":
        raise ValueError(f"{where}: model_type must be 'bert'; got {model_type!r}")
    check_settings(settings, where)
    given = {name: settings[name] for name in FIELDS if name in settings}
    try:
        return BertConfig(**{**HF_DEFAULTS, **given})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under the names of today's Transformers BertForPreTraining, without the buffer position_ids."""
    if not any(name.startswith("bert.") for name in tensors):  # BertModel alone
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name != "bert.embeddings.position_ids":
            renamed[name] = tensor
    if MLM_BIAS not in renamed and DECODER_BIAS in renamed:
        renamed[MLM_BIAS] = renamed[DECODER_BIAS]
    return renamed


def _expected_shapes(tensors: Mapping[str, Tensor], config: BertConfig, where: str) -> dict[str, tuple[int, ...]]:
    """The shape of every Transformers parameter of a BertForPreTraining. Allocates nothing, whatever the sizes."""
    if config.num_hidden_layers > len(tensors):
        raise ValueError(
            f"{where} does not hold a BertForPreTraining: the configuration has {config.num_hidden_layers} layers, and "
            f"there are only {len(tensors)} tensors"
        )
    try:
        with torch.device("meta"):
            parameters = dict(BertForPreTraining(config).named_parameters())
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond PyTorch's integers
        raise ValueError(
            f"{where} has a configuration that PyTorch cannot build: {str(error).splitlines()[0]}"
        ) from None
    return {
        part: (parameters[ours].shape[0] // len(theirs), *parameters[ours].shape[1:])
        for ours, theirs in parameter_names(config.num_hidden_layers).items()
        for part in theirs
    }


def checked(tensors: Mapping[str, Tensor], config: BertConfig, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """(The tensors that ``config`` needs, the keys of `HEADS` that are absent as a whole).

    Args:
        tensors: by the names of Transformers' BertForPreTraining.
        where: they come from, for messages.

    Raises:
        ValueError: a tensor is unknown, missing, of another shape, not floating point, or a tied copy that differs.
    """
    absent = [head for head, prefixes in HEADS.items() if not any(name.startswith(prefixes) for name in tensors)]
    absent_prefixes = tuple(prefix for head in absent for prefix in HEADS[head])
    shapes = _expected_shapes(tensors, config, where)
    expected = {name: shape for name, shape in shapes.items() if not name.startswith(absent_prefixes)}

    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        source = TIED_COPIES.get(name)
        if source is not None:
            if source in tensors and not torch.equal(tensor, tensors[source]):
                problems.append(f"{name} differs from {source}, to which it must be tied")
        elif name not in expected:
            problems.append(f"{name} is unknown")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, but the configuration needs {expected[name]}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}, not a floating-point dtype")
    if problems:
        raise ValueError(f"{where} does not hold a BertForPreTraining: {listed(problems)}")
    return {name: tensors[name] for name in expected}, absent
