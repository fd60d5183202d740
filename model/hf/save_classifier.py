"""Write a model of `heads` as a folder that Transformers' AutoModelFor… of its task loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..heads import SequenceClassifier, SpanPredictor, TokenClassifier
from .encoders import EncoderFolder
from .families import POSITIONS
from .format import CONFIG_FILE, json_bytes
from .save import unstacked, write_folder

TAGGER, SPAN_PREDICTOR = "TokenClassification", "QuestionAnswering"  # ends of Transformers' class names
READING = ("stride", "max_answer_tokens")  # how long texts are read, which `fusebert predict` takes as its defaults
REPLACED = ("num_labels", "torch_dtype", "problem_type", "null_threshold", *READING)
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
    """Write a model for AutoModelForSequenceClassification, in the family of the folder that it was made from.

    Args:
        source: the folder.
        label_names: of the C outputs; ``id2label`` in config.json.
        tokenizer: files of `copied_tokenizer`.

    Raises:
        ValueError, OSError: as `save_hf`.
    """
    settings = {**_labels(label_names), "problem_type": model.problem}
    _save(model, directory, source, "SequenceClassification", settings, tokenizer)


def save_tagger(
    model: TokenClassifier,
    directory: str | Path,
    source: EncoderFolder,
    tag_names: Sequence[str],
    tokenizer: Mapping[str, bytes],
    reading: Mapping[str, int | None] = MappingProxyType({}),
) -> None:
    """Write a model for AutoModelForTokenClassification. Other arguments and errors: as `save_classifier`.

    Args:
        reading: values of `READING` for config.json; None is left out.
    """
    _save(model, directory, source, TAGGER, {**_labels(tag_names), **_given(reading)}, tokenizer)


def save_span_predictor(
    model: SpanPredictor,
    directory: str | Path,
    source: EncoderFolder,
    tokenizer: Mapping[str, bytes],
    reading: Mapping[str, int | None] = MappingProxyType({}),
) -> None:
    """Write a model for AutoModelForQuestionAnswering, its threshold as ``null_threshold`` in config.json.

    Arguments and errors: as `save_tagger`.
    """
    settings = {**_labels(("LABEL_0", "LABEL_1")), "null_threshold": model.null_threshold, **_given(reading)}
    _save(model, directory, source, SPAN_PREDICTOR, settings, tokenizer)


def reading_of(source: EncoderFolder, name: str) -> int | None:
    """What config.json says of ``name``, one of `READING`; None if that is nothing, or no count."""
    value = source.settings.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def is_for(source: EncoderFolder, task: str) -> bool:
    """Whether the folder has a model for ``task``, `TAGGER` or `SPAN_PREDICTOR`."""
    return any(str(name).endswith(f"For{task}") for name in source.settings.get("architectures") or [])


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


def _save(
    model: nn.Module,
    directory: str | Path,
    source: EncoderFolder,
    task: str,
    settings: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
) -> None:
    # Each would override, or contradict, what is written here.
    kept = {name: value for name, value in source.settings.items() if name not in REPLACED}
    content = {**kept, "architectures": [f"{source.family.class_name}For{task}"], **settings, "dtype": "float32"}
    write_folder(directory, family_tensors(model, source), {**tokenizer, CONFIG_FILE: json_bytes(content)})


def _given(reading: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in reading.items() if value is not None}


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
