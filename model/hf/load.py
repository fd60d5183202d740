"""Read a BERT from a Hugging Face folder or from a Transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..json_file import read_json
from ..pretraining import BertForPreTraining
from .format import CONFIG_FILE, FIELDS, MLM_BIAS, WEIGHTS_FILE, WORD_EMBEDDINGS, import_safetensors, parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX_FILE = "model.safetensors.index.json"

# Transformers omits a field from config.json when it has the default of its BertConfig.
HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# Settings that change what is computed: each must be absent or have this value.
REQUIRED_SETTINGS: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
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
        config = _read_config(_read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
        tensors = _read_tensors(directory)
    elif isinstance(source, nn.Module) and hasattr(getattr(source, "config", None), "to_dict"):
        where = type(source).__name__
        config = _read_config(source.config.to_dict(), f"{where}.config")
        tensors = source.state_dict()
    else:
        raise TypeError(f"source must be a folder or a Transformers model; got {type(source).__name__}")

    tensors, absent = _checked(_renamed(tensors), config, where)
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is the folder a Hugging Face model?") from None
    except ValueError as error:  # not a file, not UTF-8, or not JSON
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return content


def _read_config(settings: Mapping[str, Any], where: str) -> BertConfig:
    model_type = settings.get("model_type")
    if model_type != "bert":
        raise ValueError(f"{where}: model_type must be 'bert'; got {model_type!r}")
    for name, required in REQUIRED_SETTINGS.items():
        value = settings.get(name)
        if value is not None and value != required:
            raise ValueError(f"{where}: {name} must be {required!r}; got {value!r}")
    given = {name: settings[name] for name in FIELDS if name in settings}
    try:
        return BertConfig(**{**HF_DEFAULTS, **given})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of all shards that its index names."""
    files = [WEIGHTS_FILE]
    if not (directory / WEIGHTS_FILE).is_file() and (directory / INDEX_FILE).is_file():
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise ValueError(
                f"{directory / INDEX_FILE} is damaged: weight_map must name a file of the folder for each tensor"
            )
        files = sorted(set(weight_map.values()))
    elif not (directory / WEIGHTS_FILE).is_file() and (directory / "pytorch_model.bin").is_file():
        raise ValueError(
            f"{directory} has its weights in pytorch_model.bin. That is a pickle, which can run code, so it is not "
            "opened: convert it with Transformers, BertForPreTraining.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    safetensors = import_safetensors()
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the folder must contain all weights of the model")
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return tensors


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


def _checked(tensors: Mapping[str, Tensor], config: BertConfig, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """(The tensors that ``config`` needs, the heads that are absent as a whole).

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
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"{where} does not hold a BertForPreTraining: {shown}")
    return {name: tensors[name] for name in expected}, absent
