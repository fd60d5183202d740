"""Read the settings and the tensors of a Hugging Face folder, which may be damaged or hostile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..json_file import read_json
from .format import WEIGHTS_FILE, import_safetensors

INDEX_FILE = "model.safetensors.index.json"
# Settings that change what is computed: each must be absent or have this value.
REQUIRED_SETTINGS: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
    "sinusoidal_pos_embds": False,
}


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: the file is missing or damaged; the message names it.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is the folder a Hugging Face model?") from None
    except ValueError as error:  # not a file, not UTF-8, or not JSON
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return content


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of all shards that its index names.

    Raises:
        ValueError: a file is missing or damaged, or the weights are a pickle; the message names it.
    """
    files = [WEIGHTS_FILE]
    if not (directory / WEIGHTS_FILE).is_file() and (directory / INDEX_FILE).is_file():
        weight_map = read_settings(directory / INDEX_FILE).get("weight_map")
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


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, with a message that starts with ``where``, if a setting changes what is computed."""
    for name, required in REQUIRED_SETTINGS.items():
        value = settings.get(name)
        if value is not None and value != required:
            raise ValueError(f"{where}: {name} must be {required!r}; got {value!r}")


def listed(problems: Sequence[str], most: int = 10) -> str:
    """The first ``most`` problems and the number of the others, for a message."""
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")
