"""Dropout(LayerNorm(word + token type + position)), BERT's input, with the gradients of its three tables.

The tables are float32 and the result has the case's dtype, as in a training step under autocast. Ids follow Zipf's law
and 12 % of them are [MASK], so that ids repeat as often as in training: the backward adds up the rows of each id.
Least work over T tokens of H elements, e = 4 bytes in a table, o in the result, V rows in all tables:

    pass        FLOPs   bytes
    forward     0       T ((e + o) H + 24)          each token's word row and three int64 ids read, the result written;
                                                    the small tables stay in the cache
    backward    0       T ((e + o) H + 24) + V H e  the same read, with the result's gradient in place of the result;
                                                    the tables' gradients written, also rows that do not occur
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import dropout_mask, embed_layernorm, reference
from ..measure.case import OURS, Cost, Tensors
from ..measure.shapes import Shape
from .build import Dimension, Operator, Random, Setting

EPS, PADDING_IDX, MASK_ID, FIRST_ORDINARY = 1e-12, 0, 3, 4
POSITIONS, TYPES, SEQLEN = 512, 2, 128


class EmbedLayerNorm(Operator):
    name = "embed_layernorm"
    dimensions = (
        Dimension("T", "tokens", gpu=65536, cpu=1024),
        Dimension("H", "elements of a row", gpu=768, cpu=128),
        Dimension("V", "words", gpu=30522, cpu=2048),
        Dimension("p", "dropout probability", gpu=0.1, cpu=0.1),
    )
    gpu_shapes = ((2, "H=768"), (10, "H=1024; H=768,p=0; T=8192"))  # BERT-base's and BERT-large's input
    cpu_shapes = ((2, "H=128"),)
    differentiated = ("word_weight", "token_type_weight", "position_weight", "norm_weight", "norm_bias")

    def setting(self, shape: Shape, device: torch.device, dtype: torch.dtype, quick: bool) -> Setting:
        """Raises: ValueError: V leaves no room for ordinary words."""
        if int(shape["V"]) <= FIRST_ORDINARY:
            raise ValueError(f"V={shape['V']}: must be above {FIRST_ORDINARY}, the special tokens")
        return super().setting(shape, device, dtype, quick)

    def inputs(self, setting: Setting, random: Random) -> Tensors:
        tokens, hidden_size, vocab = setting.sizes("T", "H", "V")
        weights = 1.0 / (torch.arange(vocab - FIRST_ORDINARY, device=setting.device) + 2.7)
        words = FIRST_ORDINARY + torch.multinomial(weights, tokens, replacement=True, generator=random.generator)
        masked = torch.rand(tokens, generator=random.generator, device=setting.device) < 0.15 * 0.8
        positions = torch.arange(tokens, device=setting.device) % SEQLEN

        def table(rows: int) -> Tensor:
            return 0.02 * random.normal(rows, hidden_size, dtype=torch.float32)

        return {
            "input_ids": words.masked_fill(masked, MASK_ID),
            "token_type_ids": (positions >= SEQLEN // 2).long(),
            "position_ids": positions,
            "word_weight": table(vocab),
            "token_type_weight": table(TYPES),
            "position_weight": table(POSITIONS),
            "norm_weight": 1 + 0.1 * random.normal(hidden_size, dtype=torch.float32),
            "norm_bias": 0.1 * random.normal(hidden_size, dtype=torch.float32),
            "dout": random.normal(tokens, hidden_size),
        }

    def options(self, setting: Setting) -> dict[str, Any]:
        return {"out_dtype": setting.dtype}

    def cost(self, setting: Setting) -> tuple[Cost, Cost]:
        tokens, hidden_size, vocab = setting.sizes("T", "H", "V")
        each = tokens * ((4 + setting.dtype.itemsize) * hidden_size + 24)
        return Cost(0, each), Cost(0, each + 4 * (vocab + POSITIONS + TYPES) * hidden_size)

    @staticmethod
    def reference(dropout_p: float, seed: Tensor, **arguments: Any) -> Tensor:
        """With the dropout mask that our kernel draws."""
        mask, table = None, arguments["word_weight"]
        if dropout_p:
            mask = dropout_mask(dropout_p, seed, len(arguments["input_ids"]), table.shape[1], device=table.device)
        return reference.embed_layernorm(**arguments, eps=EPS, p=dropout_p, padding_idx=PADDING_IDX, dropout_mask=mask)


OPERATOR = EmbedLayerNorm()


@OPERATOR.contestant("fusebert", role=OURS, replays_dropout=True)
def fusebert(dropout_p: float, seed: Tensor | None = None, **arguments: Any) -> Tensor:
    return embed_layernorm(**arguments, eps=EPS, p=dropout_p, seed=seed, padding_idx=PADDING_IDX)


@OPERATOR.contestant("torch eager")
def eager(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    token_type_weight: Tensor,
    position_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_dtype: torch.dtype,
    dropout_p: float,
) -> Tensor:
    """As Transformers' BertEmbeddings under autocast. The first linear makes the cast."""
    x = F.embedding(input_ids, word_weight, PADDING_IDX) + F.embedding(token_type_ids, token_type_weight)
    x = x + F.embedding(position_ids, position_weight)
    return F.dropout(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), dropout_p).to(out_dtype)


OPERATOR.compiled_peer(eager)
