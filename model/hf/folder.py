"""Hugging Face interchange: read a BERT that Transformers wrote, and write one that it reads.

A folder is config.json, model.safetensors (or shards with an index) and the tokenizer's files; neither direction needs
Transformers. The parameters correspond one to one, but for three things:

- a layer's query, key and value matrices are one [3H, H] matrix here;
- the MLM decoder is the word embeddings and its bias ``cls.predictions.bias``; files may carry copies of both under
  ``cls.predictions.decoder``, which must be equal, and the one written here does not;
- files from TensorFlow's days call LayerNorm's weight and bias ``gamma`` and ``beta``, and some carry the
  ``position_ids`` buffer, which is 0, 1, 2, ….
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..pretraining import BertForPreTraining

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Transformers leaves a field out of config.json when it has the default of its own BertConfig.
HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
FIELDS = tuple(BertConfig.__dataclass_fields__)
# Settings that would change what is computed: each must be absent or have this value.
REQUIRED_SETTINGS: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}

DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
MLM_BIAS = "cls.predictions.bias"
# What a checkpoint of the encoder alone, or of one task, may lack as a whole: the head, and its tensors' prefixes.
HEADS: dict[str, tuple[str, ...]] = {
    "masked-language-model head": ("cls.predictions.",),
    "pooler": ("bert.pooler.",),
    "next-sentence head": ("cls.seq_relationship.",),
}

BERT_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def _module_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Our modules' names → Transformers' (three for the fused query, key and value)."""
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


def parameter_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Each parameter of our `BertForPreTraining` → the Transformers parameters stacked in it, along the first axis."""
    names: dict[str, tuple[str, ...]] = {"mlm_bias": (MLM_BIAS,)}
    for table in ("word_embeddings", "token_type_embeddings", "position_embeddings"):
        names[f"encoder.embeddings.{table}.weight"] = (f"bert.embeddings.{table}.weight",)
    for ours, theirs in _module_names(num_layers).items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = tuple(f"{module}.{kind}" for module in theirs)
    return names


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
        config = _read_config(_read_json(_existing(directory) / CONFIG_FILE), str(directory / CONFIG_FILE))
        tensors = _read_tensors(directory)
        where = str(directory)
    elif isinstance(source, nn.Module) and hasattr(getattr(source, "config", None), "to_dict"):
        where = type(source).__name__
        config = _read_config(source.config.to_dict(), f"{where}.config")
        tensors = source.state_dict()
    else:
        raise TypeError(f"source must be a folder or a Transformers model; got {type(source).__name__}")

    model = BertForPreTraining(config)
    parameters = dict(model.named_parameters())
    names = parameter_names(config.num_hidden_layers)
    shapes = {
        part: (parameters[ours].shape[0] // len(theirs), *parameters[ours].shape[1:])
        for ours, theirs in names.items()
        for part in theirs
    }
    tensors, absent = _checked(_canonical(tensors), shapes, where)
    if absent:
        warnings.warn(f"{where} has no {' and no '.join(absent)}: initialised at random", stacklevel=2)
    with torch.no_grad():
        for ours, theirs in names.items():
            if theirs[0] in tensors:
                parameters[ours].copy_(torch.cat([tensors[part].to("cpu", torch.float32) for part in theirs]))
    return model


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a folder; nothing is downloaded here: fetch the model first, for example with "
            "`hf download NAME --local-dir FOLDER`, and give that folder"
        )
    return directory


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is the folder a Hugging Face model?") from None
    except ValueError as error:  # not UTF-8, or not JSON
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
    """The tensors of model.safetensors, or of every shard its index names."""
    files = [WEIGHTS_FILE]
    if not (directory / WEIGHTS_FILE).is_file() and (directory / INDEX_FILE).is_file():
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise ValueError(
                f"{directory / INDEX_FILE} is damaged: weight_map must give a file of the folder for each tensor"
            )
        files = sorted(set(weight_map.values()))
    elif not (directory / WEIGHTS_FILE).is_file() and (directory / "pytorch_model.bin").is_file():
        raise ValueError(
            f"{directory} has its weights in pytorch_model.bin, a pickle, which can run code and is not opened here: "
            "convert it with Transformers, BertForPreTraining.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    safetensors = _safetensors()
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the model's weights are not, or not all, in the folder")
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return tensors


def _safetensors() -> Any:
    """The library, when a file is to be read or written: the kernels and `fuse` are installed without it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{WEIGHTS_FILE} needs a package: pip install safetensors") from error
    return safetensors


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under the names of today's BertForPreTraining, without the position_ids buffer."""
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


def _checked(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """(The tensors named in ``shapes``, the heads that are absent as a whole).

    Raises:
        ValueError: a tensor is unknown, missing, of another shape, not floating point, or a tied copy that differs.
    """
    absent = [head for head, prefixes in HEADS.items() if not any(name.startswith(prefixes) for name in tensors)]
    absent_prefixes = tuple(prefix for head in absent for prefix in HEADS[head])
    expected = {name: shape for name, shape in shapes.items() if not (absent and name.startswith(absent_prefixes))}

    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        source = {DECODER_WEIGHT: WORD_EMBEDDINGS, DECODER_BIAS: MLM_BIAS}.get(name)
        if source is not None:
            if source in tensors and not torch.equal(tensor, tensors[source]):
                problems.append(f"{name} differs from {source}, to which it must be tied")
        elif name not in expected:
            problems.append(f"{name} is unknown")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the configuration says {expected[name]}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, not floating point")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"{where} does not hold a BertForPreTraining: {shown}")
    return {name: tensors[name] for name in expected}, absent


def save_hf(model: BertForPreTraining, directory: str | Path, tokenizer: str | Path | None = None) -> None:
    """Write ``model`` as a Hugging Face folder: ``transformers.BertForPreTraining.from_pretrained(directory)``.

    Writes config.json, model.safetensors (float32) and, given a tokenizer, tokenizer.json, tokenizer_config.json,
    special_tokens_map.json and vocab.txt, so that ``AutoTokenizer.from_pretrained(directory)`` encodes as it does.
    All of it is first written beside ``directory``; a folder that is there already keeps its other files, and has no
    config.json, without which nothing loads it, until every new file is in place.

    Args:
        model: the model itself, not a DistributedDataParallel or compiled wrapper of it.
        tokenizer: a tokenizer.json of the tokenizers library, with no more tokens than the model's vocab_size.

    Raises:
        TypeError: ``model`` is not a `BertForPreTraining`.
        ValueError: the tokenizer's file is missing or damaged or has more tokens than the model has rows, or
            ``directory`` is a file.
        OSError: the disk refuses; nothing of ``directory`` has then changed.
    """
    if not isinstance(model, BertForPreTraining):
        raise TypeError(
            f"model must be a fusebert BertForPreTraining; got {type(model).__name__} (of a wrapper, give the model "
            "inside: .module or ._orig_mod)"
        )
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must be a folder or not exist; {directory} is a file")
    files = {} if tokenizer is None else _tokenizer_files(Path(tokenizer), model.config)
    files[CONFIG_FILE] = _json(_hf_settings(model.config))

    safetensors = _safetensors()
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        try:
            safetensors.torch.save_file(_hf_tensors(model), partial / WEIGHTS_FILE, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"cannot write {directory / WEIGHTS_FILE}: {error}") from None
        for name, content in files.items():
            (partial / name).write_bytes(content)
        # safetensors makes its file readable by the owner alone, whatever the umask says.
        (partial / WEIGHTS_FILE).chmod((partial / CONFIG_FILE).stat().st_mode)
        for path in partial.iterdir():
            _flush_to_disk(path)
        if directory.exists():
            _replace_files(partial, directory)
        else:
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _flush_to_disk(directory.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_files(new: Path, directory: Path) -> None:
    """Move every file of ``new`` into ``directory``, config.json last."""
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        path.replace(directory / path.name)
    _flush_to_disk(directory)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _hf_settings(config: BertConfig) -> dict[str, Any]:
    """config.json; every field is written, so that no other version's defaults can enter."""
    return {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        **{name: getattr(config, name) for name in FIELDS},
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _hf_tensors(model: BertForPreTraining) -> dict[str, Tensor]:
    """The parameters under Transformers' names; float32, contiguous, none sharing memory with another."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for ours, theirs in parameter_names(model.config.num_hidden_layers).items():
        parts = parameters[ours].detach().to("cpu", torch.float32).chunk(len(theirs))
        tensors.update(
            {name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(theirs, parts, strict=True)}
        )
    return tensors


def _tokenizer_files(path: Path, config: BertConfig) -> dict[str, bytes]:
    """File name → content, for every file AutoTokenizer wants."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ValueError(f"tokenizer must be a tokenizer.json; {path} is not a file")
    content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"{path} has {num_tokens} tokens but the model only {config.vocab_size} (vocab_size): give the tokenizer "
            "the model was trained with"
        )
    special = {role: token for role, token in BERT_SPECIAL_TOKENS.items() if tokenizer.token_to_id(token) is not None}
    settings = {
        **_tokenizer_class(json.loads(tokenizer.to_str())),
        **special,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
    }
    vocabulary = _vocabulary(tokenizer)
    if vocabulary is not None:
        files["vocab.txt"] = "".join(f"{token}\n" for token in vocabulary).encode()
    return files


def _tokenizer_class(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The class, and its settings, under which Transformers does what the tokenizer.json ``pipeline`` says.

    Transformers' BertTokenizer builds BERT's pipeline anew from the vocabulary and its settings, so only a tokenizer
    that is exactly that may be called one; every other is taken as it is written, by PreTrainedTokenizerFast.
    """
    model, normalizer, added = pipeline["model"], pipeline["normalizer"] or {}, pipeline["added_tokens"]
    if (
        model["type"] == "WordPiece"
        and model["unk_token"] == "[UNK]"
        and model["continuing_subword_prefix"] == "##"
        and model["max_input_chars_per_word"] == 100
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and pipeline["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and pipeline["post_processor"]
        and {token["content"] for token in added} >= set(BERT_SPECIAL_TOKENS.values())
    ):
        return {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def _vocabulary(tokenizer: Tokenizer) -> list[str] | None:
    """The tokens in the order of their ids, if it is a WordPiece with an unbroken range of ids; else None."""
    from tokenizers.models import WordPiece

    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    unbroken = [ids[token] for token in tokens] == list(range(len(tokens)))
    return tokens if unbroken and isinstance(tokenizer.model, WordPiece) else None


__all__ = ["from_hf", "parameter_names", "save_hf"]
