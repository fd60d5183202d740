"""Write a BERT as a Hugging Face folder that Transformers loads."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import sync_directory, sync_file
from ..config import BertConfig
from ..pretraining import BertForPreTraining
from .format import CONFIG_FILE, FIELDS, WEIGHTS_FILE, json_bytes, parameter_names, save_tensors
from .tokenizer_files import tokenizer_files


def save_hf(
    model: BertForPreTraining,
    directory: str | Path,
    tokenizer: str | Path | None = None,
    *,
    model_max_length: int | None = None,
) -> None:
    """Write ``model`` as a Hugging Face folder: ``transformers.BertForPreTraining.from_pretrained(directory)``.

    Writes config.json, model.safetensors (float32) and, given a tokenizer, tokenizer.json, tokenizer_config.json,
    special_tokens_map.json and vocab.txt, so that ``AutoTokenizer.from_pretrained(directory)`` encodes like it, with
    [CLS] and [SEP] as in pretraining, and without padding and truncation.
    All files are first written beside ``directory``. An existing folder keeps its other files and has no config.json,
    without which it cannot be loaded, until every new file is in place.

    Args:
        model: the model itself, not a DistributedDataParallel or compiled wrapper of it.
        tokenizer: a tokenizer.json of the tokenizers library, with at most vocab_size tokens.
        model_max_length: for tokenizer_config.json, the positions that were trained; None: all of the model's.

    Raises:
        TypeError: ``model`` is not a `BertForPreTraining`.
        ValueError: the tokenizer's file is missing or damaged or has more tokens than the model has rows, or
            ``directory`` is a file.
        OSError: a file cannot be written, for example because the disk is full; ``directory`` is then unchanged. The
            error names the file.
    """
    if not isinstance(model, BertForPreTraining):
        raise TypeError(
            f"model must be a fusebert BertForPreTraining; got {type(model).__name__}. If that is a wrapper, give the "
            "model inside: .module or ._orig_mod"
        )
    files = {} if tokenizer is None else tokenizer_files(Path(tokenizer), model.config, model_max_length)
    files[CONFIG_FILE] = json_bytes(config_content(model.config, "BertForPreTraining"))
    write_folder(directory, _tensors(model), files)


def write_folder(directory: str | Path, tensors: dict[str, Tensor], files: dict[str, bytes]) -> None:
    """Write model.safetensors and ``files``, config.json among them, as `save_hf` does.

    Args:
        tensors: by Transformers' names, contiguous, without shared memory.
        files: name → content. A name may have a folder in front, as in ``1_Pooling/config.json``.

    Raises:
        ValueError, OSError: as `save_hf`.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must be a folder or not exist; {directory} is a file")
    for name in (WEIGHTS_FILE, *files):
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is in the place of a file: move it", str(directory / name))
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        name = WEIGHTS_FILE
        save_tensors(partial / WEIGHTS_FILE, tensors, {"format": "pt"})
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        # safetensors makes its file readable by the owner only, whatever the umask is.
        (partial / WEIGHTS_FILE).chmod((partial / CONFIG_FILE).stat().st_mode)
        for name in (WEIGHTS_FILE, *files):
            sync_file(partial / name)
        if directory.exists():
            _move_files(partial, directory)
        else:
            partial.rename(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory / name)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_directory(directory.parent)


def _move_files(source: Path, directory: Path) -> None:
    """Move every file of ``source`` into ``directory``, config.json last."""
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == Path(CONFIG_FILE)):
        (directory / path).parent.mkdir(exist_ok=True)
        (source / path).replace(directory / path)
    sync_directory(directory)


def config_content(config: BertConfig, architecture: str) -> dict[str, Any]:
    """The content of config.json, with every field written: another version's defaults cannot change it."""
    return {
        "architectures": [architecture],
        "model_type": "bert",
        **{name: getattr(config, name) for name in FIELDS},
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _tensors(model: BertForPreTraining) -> dict[str, Tensor]:
    """The parameters under Transformers' names: float32, contiguous, without shared memory."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for ours, theirs in parameter_names(model.config.num_hidden_layers).items():
        tensors |= unstacked(parameters[ours], theirs)
    return tensors


def unstacked(parameter: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The parts of a parameter, one for each of ``names``, along its first axis: copies in float32 on the CPU."""
    parts = parameter.detach().to("cpu", torch.float32).chunk(len(names))
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(names, parts, strict=True)}
