"""The format of a Hugging Face BERT folder: names of files, settings and parameters."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import BertConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

FIELDS = tuple(BertConfig.__dataclass_fields__)
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
MLM_BIAS = "cls.predictions.bias"


def parameter_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Each parameter of our `BertForPreTraining` → the Transformers parameters that it stacks along the first axis."""
    names: dict[str, tuple[str, ...]] = {"mlm_bias": (MLM_BIAS,)}
    for table in ("word_embeddings", "token_type_embeddings", "position_embeddings"):
        names[f"encoder.embeddings.{table}.weight"] = (f"bert.embeddings.{table}.weight",)
    for ours, theirs in _module_names(num_layers).items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = tuple(f"{module}.{kind}" for module in theirs)
    return names


def _module_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Our modules → Transformers' (three for the joint query, key and value)."""
    names: dict[str, tuple[str, ...]] = {
        "encoder.embeddings.norm": ("bert.embeddings.LayerNorm",),
        "mlm_dense": ("cls.predictions.transform.dense",),
        "mlm_norm": ("cls.predictions.transform.LayerNorm",),
        "pooler": ("bert.pooler.dense",),
        "nsp_classifier": ("cls.seq_relationship",),
    }
    for i in range(num_layers):
        ours, theirs = f"encoder.layers.{i}", f"bert.encoder.layer.{i}"
        names |= {
            f"{ours}.qkv": tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")),
            f"{ours}.attention_output": (f"{theirs}.attention.output.dense",),
            f"{ours}.attention_norm": (f"{theirs}.attention.output.LayerNorm",),
            f"{ours}.intermediate": (f"{theirs}.intermediate.dense",),
            f"{ours}.output": (f"{theirs}.output.dense",),
            f"{ours}.output_norm": (f"{theirs}.output.LayerNorm",),
        }
    return names


def import_safetensors() -> Any:
    """The library, imported on first use: the kernels and `fuse` work without it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{WEIGHTS_FILE} needs the package safetensors: pip install safetensors") from error
    return safetensors


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the operating system's error, which safetensors wraps in a message of its own.
    """
    safetensors = import_safetensors()
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata or None)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def json_bytes(content: Any) -> bytes:
    """The content of a JSON file of the folder."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
