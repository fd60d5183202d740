"""The BERT-like families that `BertEncoder` computes: settings and names of their Hugging Face folders.

    bert                             BERT, MiniLM, most sentence encoders
    roberta, xlm-roberta, camembert  positions start at pad_token_id + 1; no token types
    electra                          a linear after the embeddings, which may be narrower than the layers
    distilbert                       other names; no token types; no pooler

All are post-LN encoders with learned positions and exact GELU, and so are their masked-language heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import BertConfig
from .format import FIELDS, MLM_BIAS, parameter_names

TOKEN_TYPES = "encoder.embeddings.token_type_embeddings.weight"
POSITIONS = "encoder.embeddings.position_embeddings.weight"
TOKEN_HEADS = {"tag_out": "classifier", "span_out": "qa_outputs"}  # our module → theirs, in every family


@dataclasses.dataclass(frozen=True)
class Family:
    """How a folder of one ``model_type`` says what we need.

    Attributes:
        prefix: of the encoder's parameters in a model with a head.
        class_name: of Transformers' classes, before ``ForSequenceClassification``.
        activation: between the two linears of the classification head: "tanh", "gelu" or "relu".
        head_dropout: keys in config.json of the dropout in the classification head; the first that is set counts.
        default_dropout: without them.
        input_dropout: the classification head drops its input too.
        tag_dropout: as ``head_dropout``, of the head that classifies tokens; without them 0.1.
        span_dropout: keys of the dropout in the head that finds answers; without them 0.1; None: it has no dropout.
        heads: our module or bias outside of the layers → theirs.
        renames: in BERT's names of the encoder's parameters, what to replace by what.
        settings: field of `BertConfig` → key in config.json, where they differ.
        defaults: fields that config.json may omit.
        tied: their parameters that a file may hold as a copy → the one that they must equal.
        positions_after_pad: the first token has position pad_token_id + 1, not 0.
        token_types: the second text of a pair has token type 1; else all types are 0.
    """

    prefix: str
    class_name: str
    activation: str
    head_dropout: tuple[str, ...]
    heads: Mapping[str, str]
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    positions_after_pad: bool = False
    token_types: bool = True
    default_dropout: float = 0.1
    input_dropout: bool = False
    tag_dropout: tuple[str, ...] = ("classifier_dropout", "hidden_dropout_prob")
    span_dropout: tuple[str, ...] | None = None

    def config(self, content: Mapping[str, Any]) -> BertConfig:
        """Our configuration for the content of a config.json.

        Raises:
            ValueError: a setting is not allowed.
        """
        keys = {name: self.settings.get(name, name) for name in FIELDS}
        values = {**self.defaults, **{name: content[key] for name, key in keys.items() if key in content}}
        if self.positions_after_pad:
            pad, positions = values.get("pad_token_id"), values.get("max_position_embeddings")
            if not isinstance(pad, int) or not isinstance(positions, int) or positions <= pad + 1:
                raise ValueError(f"max_position_embeddings must be above pad_token_id + 1; got {positions!r}, {pad!r}")
            values["max_position_embeddings"] = positions - pad - 1
        return BertConfig(**values)

    def head_dropout_p(self, content: Mapping[str, Any]) -> float:
        """The dropout probability in the classification head, for the content of a config.json."""
        return _stated(content, self.head_dropout, self.default_dropout)

    def tag_dropout_p(self, content: Mapping[str, Any]) -> float:
        """The dropout probability in the head that classifies tokens."""
        return _stated(content, self.tag_dropout, 0.1)

    def span_dropout_p(self, content: Mapping[str, Any]) -> float:
        """The dropout probability in the head that finds answers."""
        return 0.0 if self.span_dropout is None else _stated(content, self.span_dropout, 0.1)

    def first_position(self, config: BertConfig) -> int:
        """Rows of their position table before the first token's."""
        return (config.pad_token_id or 0) + 1 if self.positions_after_pad else 0

    def names(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """Our parameter → theirs that it stacks along the first axis, of the encoder and of every head.

        A parameter of ours that they lack is absent, and has the value 0.
        """
        names = {
            ours: tuple(self._encoder_name(each) for each in theirs)
            for ours, theirs in parameter_names(num_layers).items()
            if ours.startswith("encoder.") and not (ours == TOKEN_TYPES and self.class_name == "DistilBert")
        }
        for ours, theirs in {**self.heads, **TOKEN_HEADS}.items():
            if ours == "mlm_bias":
                names[ours] = (theirs,)
            else:
                names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}
        return names

    def _encoder_name(self, bert_name: str) -> str:
        name = bert_name.removeprefix("bert.")
        for old, new in self.renames.items():
            name = name.replace(old, new)
        return self.prefix + name


def _stated(content: Mapping[str, Any], keys: tuple[str, ...], default: float) -> float:
    """The first of ``keys`` that is set in ``content``."""
    stated = [content[key] for key in keys if content.get(key) is not None]
    return float(stated[0]) if stated else default


# Transformers omits a field from config.json when it has the default of its class.
_BERT_SIZES: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def _roberta() -> Family:
    return Family(
        prefix="roberta.",
        class_name="Roberta",
        activation="tanh",
        head_dropout=("classifier_dropout", "hidden_dropout_prob"),
        heads={
            "pooler": "roberta.pooler.dense",
            "mlm_dense": "lm_head.dense",
            "mlm_norm": "lm_head.layer_norm",
            "mlm_bias": "lm_head.bias",
            "dense": "classifier.dense",
            "out": "classifier.out_proj",
        },
        defaults={**_BERT_SIZES, "vocab_size": 50265, "pad_token_id": 1, "max_position_embeddings": 512},
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        positions_after_pad=True,
        token_types=False,
        input_dropout=True,
    )


FAMILIES: dict[str, Family] = {
    "bert": Family(
        prefix="bert.",
        class_name="Bert",
        activation="tanh",
        head_dropout=("classifier_dropout", "hidden_dropout_prob"),
        heads={
            "pooler": "bert.pooler.dense",
            "mlm_dense": "cls.predictions.transform.dense",
            "mlm_norm": "cls.predictions.transform.LayerNorm",
            "mlm_bias": MLM_BIAS,
            "nsp_classifier": "cls.seq_relationship",
            "dense": "bert.pooler.dense",
            "out": "classifier",
        },
        defaults=_BERT_SIZES,
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": MLM_BIAS,
        },
    ),
    "roberta": _roberta(),
    "xlm-roberta": dataclasses.replace(_roberta(), class_name="XLMRoberta"),
    "camembert": dataclasses.replace(_roberta(), class_name="Camembert"),
    "electra": Family(
        prefix="electra.",
        class_name="Electra",
        activation="gelu",
        head_dropout=("classifier_dropout", "hidden_dropout_prob"),
        heads={
            "encoder.embeddings.projection": "electra.embeddings_project",
            "mlm_dense": "generator_predictions.dense",
            "mlm_norm": "generator_predictions.LayerNorm",
            "mlm_bias": "generator_lm_head.bias",
            "dense": "classifier.dense",
            "out": "classifier.out_proj",
        },
        defaults={**_BERT_SIZES, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
        input_dropout=True,
    ),
    "distilbert": Family(
        prefix="distilbert.",
        class_name="DistilBert",
        activation="relu",
        head_dropout=("seq_classif_dropout",),
        heads={
            "mlm_dense": "vocab_transform",
            "mlm_norm": "vocab_layer_norm",
            "mlm_bias": "vocab_projector.bias",
            "dense": "pre_classifier",
            "out": "classifier",
        },
        renames={
            "encoder.layer.": "transformer.layer.",
            "attention.self.query": "attention.q_lin",
            "attention.self.key": "attention.k_lin",
            "attention.self.value": "attention.v_lin",
            "attention.output.dense": "attention.out_lin",
            "attention.output.LayerNorm": "sa_layer_norm",
            "intermediate.dense": "ffn.lin1",
            "output.dense": "ffn.lin2",
            "output.LayerNorm": "output_layer_norm",
        },
        settings={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        defaults={**_BERT_SIZES, "num_hidden_layers": 6, "type_vocab_size": 1},
        tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        token_types=False,
        default_dropout=0.2,
        tag_dropout=("dropout",),
        span_dropout=("qa_dropout",),
    ),
}
