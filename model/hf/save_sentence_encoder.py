"""Write a `SentenceEncoder` as a folder of sentence-transformers.

    config.json, model.safetensors, tokenizer.json, …    the encoder, which Transformers' AutoModel loads
    modules.json, sentence_bert_config.json              what follows the encoder; the longest text
    1_Pooling/config.json, 2_Normalize/config.json       the pooling; scaling to length 1

The names are those that every version of sentence-transformers since 2.0 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..heads import SentenceEncoder
from .encoders import EncoderFolder
from .format import CONFIG_FILE, json_bytes
from .save import write_folder
from .save_classifier import family_tensors


def save_sentence_encoder(
    model: SentenceEncoder,
    directory: str | Path,
    source: EncoderFolder,
    tokenizer: Mapping[str, bytes],
    *,
    seqlen: int,
    normalize: bool,
) -> None:
    """Write ``model`` in the family of the folder that it was made from.

    Args:
        model: with the pooling "mean", "cls" or "max".
        source: the folder.
        tokenizer: files of `copied_tokenizer`.
        seqlen: the most tokens of a text.
        normalize: the vectors are scaled to length 1.

    Raises:
        ValueError, OSError: as `save_hf`.
    """
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(modules) if i)]
    # Transformers would initialise a pooler that is missing, with a warning.
    pooler = {name: tensor for name, tensor in source.tensors.items() if ".pooler." in name}
    tensors = {**{name: tensor.float().clone() for name, tensor in pooler.items()}, **family_tensors(model, source)}
    settings = {name: value for name, value in source.settings.items() if name not in HEAD_SETTINGS}
    files: dict[str, Any] = {
        CONFIG_FILE: {**settings, "architectures": [f"{source.family.class_name}Model"], "dtype": "float32"},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(modules, paths, strict=True))
        ],
        "sentence_bert_config.json": {"max_seq_length": seqlen, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            "pooling_mode_cls_token": model.pooling == "cls",
            "pooling_mode_mean_tokens": model.pooling == "mean",
            "pooling_mode_max_tokens": model.pooling == "max",
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        **({"2_Normalize/config.json": {}} if normalize else {}),
    }
    encoder = {name.removeprefix(source.family.prefix): tensor for name, tensor in tensors.items()}
    write_folder(directory, encoder, {**tokenizer, **{name: json_bytes(content) for name, content in files.items()}})


HEAD_SETTINGS = ("id2label", "label2id", "num_labels", "problem_type", "torch_dtype")  # of a model with another head
