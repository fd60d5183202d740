"""The numbers that define an encoder, under the names of Transformers' ``config.json``, and the presets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

# (num_hidden_layers, hidden_size, num_attention_heads, intermediate_size). Heads have size 64. base and large are from
# Devlin et al. 2018, the others from Turc et al. 2019.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (2, 128, 2, 512),
    "mini": (4, 256, 4, 1024),
    "small": (4, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and arithmetic of a BERT encoder (Devlin et al. 2018). The defaults are BERT's.

    Attributes:
        vocab_size: V, rows of the word embeddings and of the tied decoder.
        hidden_size: H, a multiple of ``num_attention_heads``.
        num_hidden_layers: L.
        num_attention_heads: heads a layer, each of size hidden_size / num_attention_heads.
        intermediate_size: I, width of the feed-forward's inner layer.
        hidden_act: "gelu", the exact GELU x·Φ(x) of BERT's checkpoints; no other value is allowed.
        hidden_dropout_prob: dropout of the embeddings and of each sub-layer's output, in [0, 1).
        attention_probs_dropout_prob: dropout of the attention probabilities, in [0, 1).
        max_position_embeddings: length of the longest segment.
        type_vocab_size: number of token types (sentence A, sentence B).
        initializer_range: standard deviation of the normal initialisation, positive.
        layer_norm_eps: added to the variance in every LayerNorm, positive.
        pad_token_id: this token's word embedding starts at zero and gets no gradient from the input side; or None.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads; got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act must be 'gelu'; got {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be a number in [0, 1); got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        pad = self.pad_token_id
        if pad is not None and (not isinstance(pad, int) or not 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id must be None or in [0, {self.vocab_size}), the vocabulary; got {pad!r}")

    @classmethod
    def preset(cls, name: str, vocab_size: int, **changes: Any) -> BertConfig:
        """The preset ``name`` (tiny, mini, small, base or large) with ``vocab_size`` tokens.

        Args:
            changes: fields to replace, by name.

        Raises:
            ValueError: there is no such preset, or a value is not allowed.
            TypeError: ``changes`` contains a name that is no field.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
        layers, hidden, heads, intermediate = PRESETS[name]
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
        }
        return cls(vocab_size=vocab_size, **{**shape, **changes})
