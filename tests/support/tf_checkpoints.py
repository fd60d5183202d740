"""Writes checkpoints as google-research/bert does. Without TensorFlow a stand-in for its reader reads them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

HAVE_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
HEADS = {
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
    "classifier.weight": "output_weights",
    "classifier.bias": "output_bias",
}


def variables_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights of a model of Transformers as google-research/bert names them, with what Adam leaves."""
    found = {"global_step": np.array(7, dtype=np.int64)}
    for name, value in model.state_dict().items():
        if name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
            continue
        array = value.numpy()
        if name in HEADS:
            variable = HEADS[name]
        elif name.endswith("embeddings.weight"):
            variable = name.removesuffix(".weight").replace(".", "/")
        else:
            *path, kind = re.sub(r"layer\.(\d+)", r"layer_\1", name).split(".")
            is_norm = path[-1] == "LayerNorm"
            kinds = {"weight": "gamma", "bias": "beta"} if is_norm else {"weight": "kernel", "bias": "bias"}
            variable = "/".join([*path, kinds[kind]])
            array = array.T if kinds[kind] == "kernel" else array
        found[variable] = np.ascontiguousarray(array)
        found[f"{variable}/adam_m"] = found[f"{variable}/adam_v"] = np.zeros_like(array)
    return found


def write_checkpoint(path: Path, variables: Mapping[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint with the prefix ``path``. It can be read until the end of the test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if HAVE_TENSORFLOW:
        import tensorflow as tf

        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            for name, value in variables.items():
                tf.compat.v1.get_variable(name, initializer=value)
            session.run(tf.compat.v1.global_variables_initializer())
            tf.compat.v1.train.Saver().save(session, str(path), write_state=False)
        return
    Path(f"{path}.index").write_text(json.dumps({name: value.shape for name, value in variables.items()}))
    np.savez(f"{path}.data-00000-of-00001.npz", **{name.replace("/", "|"): each for name, each in variables.items()})
    package = types.ModuleType("tensorflow")
    for name, member in (("errors", OpError), ("train", load_checkpoint)):
        module = types.ModuleType(f"tensorflow.{name}")
        setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, f"tensorflow.{name}", module)
    monkeypatch.setitem(sys.modules, "tensorflow", package)


class OpError(Exception):
    """As tensorflow.errors.OpError."""


class Reader:
    """As the reader of tensorflow.train.load_checkpoint."""

    def __init__(self, shapes: dict[str, list[int]], path: str) -> None:
        self._shapes, self._path = shapes, path

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return self._shapes

    def get_tensor(self, name: str) -> np.ndarray:
        with np.load(self._path) as arrays:
            return arrays[name.replace("/", "|")]


def load_checkpoint(path: str) -> Reader:
    try:
        shapes = json.loads(Path(f"{path}.index").read_text())
    except ValueError as error:
        raise OpError("Unable to open table file") from error
    return Reader(shapes, f"{path}.data-00000-of-00001.npz")
