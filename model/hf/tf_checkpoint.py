"""The weights of a TensorFlow 1 checkpoint, as google-research/bert writes them, under Transformers' names.

    bert_model.ckpt.index, bert_model.ckpt.data-00000-of-00001    variables, by name
    bert_config.json                                              sizes

A kernel is stored as [inputs, outputs], the transpose of PyTorch's weight. The outputs of heads are not transposed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folder import listed

# Variable → parameter, where the path does not say it.
_HEADS = {
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "cls/seq_relationship/output_bias": "cls.seq_relationship.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
}
_MODULES = re.compile(r"(bert/(embeddings|encoder|pooler)|cls/predictions/transform)/")
_PARTS = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
# What an optimiser keeps beside the weights, and the counter of steps.
_OF_TRAINING = re.compile(r"(.*/)?(adam_[mv]|lamb_[mv]|Adam(_1)?|Momentum)|global_step|beta[12]_power|.*learning_rate")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights of the checkpoint with the prefix ``path``: float32, by the names of Transformers' BERT classes.

    What an optimiser left there is passed over.

    Args:
        path: without ".index".

    Raises:
        ModuleNotFoundError: TensorFlow is not installed.
        ValueError: the checkpoint is damaged, of TensorFlow 2's objects, or has variables that a BERT has not.
    """
    try:
        from tensorflow.errors import OpError  # type: ignore[import-not-found, unused-ignore]
        from tensorflow.train import load_checkpoint  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading a TensorFlow checkpoint needs TensorFlow: pip install 'fusebert[tensorflow]'"
        ) from error
    try:
        reader = load_checkpoint(str(path))
        variables: dict[str, Any] = reader.get_variable_to_shape_map()
        if any("/.ATTRIBUTES/" in name for name in variables):
            raise ValueError(f"{path} is a checkpoint of TensorFlow 2's objects: give one of google-research/bert's")
        names = {name: parameter_name(name) for name in variables if not _OF_TRAINING.fullmatch(name)}
        unknown = [f"{name} {variables[name]}" for name in sorted(names) if names[name] is None]
        if unknown:
            raise ValueError(f"{path} is not of a BERT, it has the variables {listed(unknown)}")
        return {name: _tensor(variable, reader.get_tensor(variable)) for variable, name in names.items() if name}
    except (OpError, RuntimeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or a file of it is missing ({reason})") from error


def parameter_name(variable: str) -> str | None:
    """The name in Transformers of a variable, None if a BERT has no such variable."""
    if variable in _HEADS:
        return _HEADS[variable]
    if not _MODULES.match(variable):
        return None
    module, _, part = variable.rpartition("/")
    module = re.sub(r"layer_(\d+)", r"layer.\1", module).replace("/", ".")
    if part in _TABLES:
        return f"{module}.{part}.weight"
    return f"{module}.{_PARTS[part]}" if part in _PARTS else None


def _tensor(variable: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value).to(torch.float32)
    return (tensor.T if variable.endswith("/kernel") else tensor).contiguous()
