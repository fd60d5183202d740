"""Write a `SequenceClassifier` as a folder that Transformers' AutoModelForSequenceClassification loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..heads import SequenceClassifier
from .encoders import EncoderFolder
from .families import POSITIONS
from .format import CONFIG_FILE, json_bytes
from .save import unstacked, write_folder

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)


def copied_tokenizer(directory: Path, seqlen: int) -> dict[str, bytes]:
    """Name → content of the tokenizer's files in ``directory``, for texts of up to ``seqlen`` tokens."""
    files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}
    settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    return {**files, TOKENIZER_CONFIG: json_bytes({**settings, "model_max_length": seqlen})}


def save_classifier(
    model: SequenceClassifier,
    directory: str | Path,
    source: EncoderFolder,
    label_names: Sequence[str],
    tokenizer: Mapping[str, bytes],
) -> None:
    """Write ``model`` in the family of the folder that it was made from.

    Args:
        source: the folder.
        label_names: of the C outputs; ``id2label`` in config.json.
        tokenizer: files of `copied_tokenizer`.

    Raises:
        ValueError, OSError: as `save_hf`.
    """
    files = {**tokenizer, CONFIG_FILE: json_bytes(_settings(model, source, label_names))}
    write_folder(directory, family_tensors(model, source), files)


def family_tensors(model: nn.Module, source: EncoderFolder) -> dict[str, torch.Tensor]:
    """The parameters of ``model``, which was made from ``source``, under the names of its family."""
    names = source.family.names(source.config.num_hidden_layers)
    tensors: dict[str, torch.Tensor] = {}
    for ours, parameter in model.named_parameters():
        theirs = names.get(ours)
        if theirs is None:  # the token types of a family without them
            continue
        value = parameter.detach()
        if ours == POSITIONS and (before := source.family.first_position(source.config)):
            value = torch.cat([source.tensors[theirs[0]][:before].to(value), value])
        tensors |= unstacked(value, theirs)
    return tensors


def _settings(model: SequenceClassifier, source: EncoderFolder, label_names: Sequence[str]) -> dict[str, Any]:
    # Each would override what is written below.
    kept = {name: value for name, value in source.settings.items() if name not in ("num_labels", "torch_dtype")}
    return {
        **kept,
        "architectures": [f"{source.family.class_name}ForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": model.problem,
        "dtype": "float32",
    }
