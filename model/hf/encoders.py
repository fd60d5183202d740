"""Open the Hugging Face folder of any BERT-like encoder of `FAMILIES`, and load its weights into our models.

Every tensor of the folder ends up in one of three places: in the model, in ``Loading.left_over`` (a head that the model
lacks), or in an error. Parameters of the model that the folder lacks are in ``Loading.missing``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..encoder import BertEncoder
from .families import FAMILIES, POSITIONS, TOKEN_TYPES, Family
from .folder import check_settings, listed, read_settings, read_tensors
from .format import CONFIG_FILE

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclasses.dataclass(frozen=True)
class EncoderFolder:
    """A folder that is read and checked.

    Attributes:
        directory: the folder.
        settings: the content of config.json.
        family: of its ``model_type``.
        config: of the encoder.
        embedding_size: width of the embedding tables, or None if it is ``config.hidden_size``.
        tensors: by Transformers' names in a model with a head, without buffers.
    """

    directory: Path
    settings: dict[str, Any]
    family: Family
    config: BertConfig
    embedding_size: int | None
    tensors: dict[str, Tensor]

    @property
    def label_names(self) -> list[str] | None:
        """The names of a fine-tuned head's outputs, in order; None without ``id2label``.

        Raises:
            ValueError: ``id2label`` is damaged.
        """
        given = self.settings.get("id2label")
        if given is None:
            return None
        try:
            numbered = {int(number): str(name) for number, name in given.items()}
            return [numbered[i] for i in range(len(numbered))]
        except (AttributeError, KeyError, ValueError):
            raise ValueError(f"{self.directory / CONFIG_FILE}: id2label must map 0, 1, 2, … to names") from None


@dataclasses.dataclass(frozen=True)
class Loading:
    """What a folder and a model did not have in common, by Transformers' names.

    Attributes:
        missing: parameters of the model that the folder lacks, or has in another shape: initialised at random.
        left_over: tensors of the folder that the model does not use.
    """

    missing: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.missing:
            lines.append(f"not in the folder, initialised at random: {', '.join(self.missing)}")
        if self.left_over:
            lines.append(f"in the folder, not used: {', '.join(self.left_over)}")
        return "\n".join(lines)


def open_encoder(directory: str | Path) -> EncoderFolder:
    """Reads a folder with config.json and model.safetensors (or its shards), with or without heads.

    Raises:
        ValueError: the folder or a file is missing or damaged, the model is not of a known family, or a tensor of its
            encoder is missing or has the wrong shape. The message names the file and lists the tensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a folder. Nothing is downloaded: fetch the model first, for example with "
            "`hf download NAME --local-dir FOLDER`, and give that folder"
        )
    path = directory / CONFIG_FILE
    settings = read_settings(path)
    family = FAMILIES.get(str(settings.get("model_type")))
    if family is None:
        raise ValueError(f"{path}: model_type {settings.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    check_settings(settings, str(path))
    embedding_size = settings.get("embedding_size", 128) if family.class_name == "Electra" else None
    try:
        config = family.config(settings)
        if embedding_size is not None and (not isinstance(embedding_size, int) or embedding_size < 1):
            raise ValueError(f"embedding_size must be a positive integer; got {embedding_size!r}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    folder = EncoderFolder(
        directory=directory,
        settings=settings,
        family=family,
        config=config,
        embedding_size=None if embedding_size == config.hidden_size else embedding_size,
        tensors=_renamed(read_tensors(directory), family),
    )
    _check_encoder(folder)
    return folder


def load_weights(model: nn.Module, folder: EncoderFolder) -> Loading:
    """Copies the folder's weights into ``model``, which has our names (``encoder.…``, ``pooler.…``, ``out.…``).

    A table of token types that the family lacks becomes 0 and does not learn.

    Args:
        model: built for ``folder.config`` and ``folder.embedding_size``.

    Raises:
        ValueError: a copy of a tied parameter differs from it.
    """
    names, tensors = folder.family.names(folder.config.num_hidden_layers), folder.tensors
    missing: list[str] = []
    used: set[str] = set()
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            theirs = names.get(ours, ())
            if not theirs and ours.startswith("encoder."):
                parameter.zero_().requires_grad_(False)
                continue
            if not theirs or not all(name in tensors for name in theirs):
                missing += theirs or [ours]
                continue
            value = torch.cat([tensors[name].to("cpu", torch.float32) for name in theirs])
            if ours == POSITIONS:
                value = value[folder.family.first_position(folder.config) :]
            if value.shape != parameter.shape:
                missing += theirs
                continue
            parameter.copy_(value)
            used.update(theirs)
    for copy, source in folder.family.tied.items():
        if copy in tensors and source in used and hasattr(model, "mlm_bias"):
            if not torch.equal(tensors[copy], tensors[source]):
                raise ValueError(f"{folder.directory}: {copy} differs from {source}, to which it must be tied")
            used.add(copy)
    return Loading(tuple(missing), tuple(sorted(tensors.keys() - used)))


def _renamed(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """``tensors`` under the names of today's Transformers in a model with a head, without buffers."""
    if not any(name.startswith(family.prefix) for name in tensors):  # the encoder alone
        tensors = {family.prefix + name: tensor for name, tensor in tensors.items()}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if not name.endswith(BUFFERS):
            renamed[name] = tensor
    for copy, source in family.tied.items():
        if copy in renamed and copy.endswith("bias"):
            renamed.setdefault(source, renamed[copy])
    return renamed


def _check_encoder(folder: EncoderFolder) -> None:
    """Raises ValueError unless the folder has every tensor of its encoder. Allocates nothing, whatever the sizes."""
    config, family, tensors = folder.config, folder.family, folder.tensors
    path = folder.directory / CONFIG_FILE
    if config.num_hidden_layers > len(tensors):
        raise ValueError(f"{path} has {config.num_hidden_layers} layers, but there are only {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            parameters = dict(BertEncoder(config, folder.embedding_size).named_parameters(prefix="encoder"))
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond PyTorch's integers
        raise ValueError(f"{path}: PyTorch cannot build this: {str(error).splitlines()[0]}") from None
    names = family.names(config.num_hidden_layers)
    problems = []
    for ours, parameter in parameters.items():
        if ours == TOKEN_TYPES and ours not in names:
            if parameter.shape[0] != 1:
                problems.append("type_vocab_size must be 1")
            continue
        rows = parameter.shape[0] // len(names[ours]) + (family.first_position(config) if ours == POSITIONS else 0)
        for name in names[ours]:
            shape, given = (rows, *parameter.shape[1:]), tensors.get(name)
            if given is None:
                problems.append(f"{name} is missing")
            elif tuple(given.shape) != shape:
                problems.append(f"{name} has shape {tuple(given.shape)}, but the configuration needs {shape}")
            elif not given.is_floating_point():
                problems.append(f"{name} has dtype {given.dtype}, not a floating-point dtype")
    if problems:
        raise ValueError(f"{folder.directory} does not hold a {family.class_name} encoder: {listed(problems)}")
