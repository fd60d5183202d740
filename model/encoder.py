"""BERT's encoder on packed tokens: embeddings, then L post-LN layers.

Sequences lie end to end on one token axis of T rows (see `batch`). The linears and norms see a [T, H] matrix; only
attention uses the segment bounds:

    x ← LN(x + Dropout(W_o · Attention(W_qkv · x)))
    x ← LN(x + Dropout(W_2 · GELU(W_1 · x)))              Devlin et al. 2018; exact (erf) GELU, eps 1e-12

No shape and no branch depends on a value on the device, so the forward never synchronises with it.

Saved for a layer's backward, in elements a token: x (H), qkv (3H), the attention's output (H), both norms' sums (2H),
the first norm's result (H), the input and output of GELU (2I): 8H + 2I; and in float32 the statistics of attention (2h)
and of both norms (4). In bf16 with I = 4H this is 32H + 8h + 16 bytes. Masks and probabilities are not saved, and the
result of the second norm is the next layer's x. Saving less means recomputing.

Shapes: T tokens, S segments, H hidden_size, I intermediate_size, h heads of D = H / h, R rows to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import (
    FusedLayerNorm,
    FusedLinearGELU,
    attention_varlen,
    attention_varlen_separate,
    dropout_add_layernorm,
    embed_layernorm,
)
from ..kernels.backend import choose_backend
from .config import BertConfig

SEEDS_PER_LAYER = 3  # attention probabilities, and the end of each sub-layer


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's if it is on, else ``x``'s."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.no_grad()
def initialise(module: nn.Module, config: BertConfig) -> None:
    """BERT's initialisation of all linears, embeddings and LayerNorms in ``module``, from torch's generator."""
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Embedding):
            nn.init.normal_(each.weight, std=config.initializer_range)
        if isinstance(each, nn.Embedding) and each.padding_idx is not None:
            each.weight[each.padding_idx].zero_()
        if isinstance(each, nn.LayerNorm):
            nn.init.ones_(each.weight)
        if isinstance(each, nn.Linear | nn.LayerNorm):
            nn.init.zeros_(each.bias)


class ReadRows(NamedTuple):
    """The rows of the token axis that are read after the last layer.

    Attributes:
        positions: int64 [R], ascending.
        cu_seqlens: int32 [S + 1]: segment s has rows cu_seqlens[s] … cu_seqlens[s + 1] − 1 of them. The output of rows
            after the last bound is undefined.
    """

    positions: Tensor
    cu_seqlens: Tensor


class BertEmbeddings(nn.Module):
    """Word + token type + learned position, LayerNorm, dropout; then a linear to H if the tables have another width."""

    def __init__(self, config: BertConfig, embedding_size: int | None = None) -> None:
        super().__init__()
        width = config.hidden_size if embedding_size is None else embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.norm = FusedLayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.hidden_size) if width != config.hidden_size else None
        self.dropout_p = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, words: Tensor | None = None
    ) -> Tensor:
        """The embedded tokens, [T, H].

        Args:
            input_ids, token_type_ids, position_ids: int64 [T].
            words: [T, E], the word embeddings of ``input_ids`` if they are looked up already.
        """
        x = self._normalised(input_ids, token_type_ids, position_ids, words)  # [T, E]
        return x if self.projection is None else self.projection(x)  # [T, H]

    def _normalised(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, words: Tensor | None
    ) -> Tensor:
        """The tokens before the projection, [T, E]: E is the width of the tables, H without a projection."""
        word = self.word_embeddings
        if words is not None:
            x = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)  # [T, E]
            x = self.norm(x).to(compute_dtype(word.weight))
            return F.dropout(x, self.dropout_p, self.training)
        return embed_layernorm(
            input_ids,
            token_type_ids,
            position_ids,
            word.weight,
            self.token_type_embeddings.weight,
            self.position_embeddings.weight,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            p=self.dropout_p if self.training else 0.0,
            padding_idx=word.padding_idx,
            # Under autocast the residual stream has the linears' dtype: half the bytes in every norm.
            out_dtype=compute_dtype(word.weight),
        )


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each ending in dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)  # rows: queries, keys, values; each head by head
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = FusedLayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.intermediate = FusedLinearGELU(hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, hidden_size)
        self.output_norm = FusedLayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.use_linear(F.linear)

    def use_linear(self, linear: Callable[..., Tensor]) -> None:
        """Compute the layer's four matrix products with ``linear``, a function with the signature of ``F.linear``."""
        self.linear = self.intermediate.linear = linear

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        seeds: Sequence[Tensor | None] = (None,) * SEEDS_PER_LAYER,
        rows: ReadRows | None = None,
    ) -> Tensor:
        """The layer's output, [T, H], or [R, H] with ``rows``.

        Args:
            x: [T, H].
            cu_seqlens: int32 [S + 1], bounds of the segments.
            max_seqlen: upper bound of the segments' lengths.
            seeds: three int64 tensors of one element, or None.
            rows: the R rows to compute. All T rows are keys and values, but only these are queries and go through the
                rest of the layer.
        """
        attention_p, hidden_p = (self.attention_dropout_p, self.hidden_dropout_p) if self.training else (0.0, 0.0)
        if rows is None:
            qkv = self.linear(x, self.qkv.weight, self.qkv.bias).view(x.shape[0], 3, self.num_heads, -1)  # [T, 3, h, D]
            attended = attention_varlen(qkv, cu_seqlens, max_seqlen, dropout_p=attention_p, seed=seeds[0])  # [T, h, D]
        else:
            sizes = [x.shape[1], 2 * x.shape[1]]  # split instead of slices: its backward is one concatenation
            (q_weight, kv_weight), (q_bias, kv_bias) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
            kv = self.linear(x, kv_weight, kv_bias).view(x.shape[0], 2, self.num_heads, -1)  # [T, 2, h, D]
            x = x.index_select(0, rows.positions)  # [R, H]; read R for T from here on
            q = self.linear(x, q_weight, q_bias).view(x.shape[0], self.num_heads, -1)  # [R, h, D]
            k, v = kv.unbind(1)  # [T, h, D] each
            attended = attention_varlen_separate(  # [R, h, D]
                q, k, v, rows.cu_seqlens, max_seqlen, cu_seqlens, max_seqlen, dropout_p=attention_p, seed=seeds[0]
            )
        attended = attended.reshape_as(x)  # [T, H]
        x = self._add_norm(self.attention_output, self.attention_norm, attended, x, hidden_p, seeds[1])  # [T, H]
        inner = self.intermediate(x)  # [T, I]
        return self._add_norm(self.output, self.output_norm, inner, x, hidden_p, seeds[2])  # [T, H]

    def _add_norm(
        self, linear: nn.Linear, norm: nn.LayerNorm, x: Tensor, residual: Tensor, p: float, seed: Tensor | None
    ) -> Tensor:
        """norm(residual + Dropout(linear(x))). A GPU's norm kernel adds the linear's bias and sums its gradient."""
        if choose_backend(x) == "reference":  # on a CPU the matrix product adds the bias at no cost
            x, bias = self.linear(x, linear.weight, linear.bias), None
        else:
            x, bias = self.linear(x, linear.weight), linear.bias
        return dropout_add_layernorm(
            x, residual, norm.weight, norm.bias, linear_bias=bias, eps=norm.eps, p=p, seed=seed
        )


class BertEncoder(nn.Module):
    """Embeddings and L layers.

    Args:
        embedding_size: E, the width of the embedding tables, followed by a linear to H (ELECTRA); None: H, without one.

    Attributes:
        checkpoint_activations: save only each layer's input, H elements a token, and recompute the layer in the
            backward with the same dropout masks: bitwise the same gradients for a third more matrix products
            (Chen et al. 2016).
    """

    def __init__(self, config: BertConfig, embedding_size: int | None = None) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config, embedding_size)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.max_position_embeddings = config.max_position_embeddings
        self.checkpoint_activations = False
        self.has_dropout = max(config.hidden_dropout_prob, config.attention_probs_dropout_prob) > 0.0

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: ReadRows | None = None,
        words: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, H], or [R, H] with ``rows``.

        Args:
            input_ids, token_type_ids, position_ids: int64 [T].
            cu_seqlens: int32 [S + 1], bounds of the segments.
            max_seqlen: upper bound of the segments' lengths.
            rows: the R rows to compute in the last layer.
            words: see `BertEmbeddings`.

        Raises:
            ValueError: ``max_seqlen`` is larger than the number of position embeddings.
        """
        if max_seqlen > self.max_position_embeddings:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, but the model has positions for {self.max_position_embeddings}: pack "
                "shorter segments, or build the model with a larger max_position_embeddings"
            )
        x = self.embeddings(input_ids, token_type_ids, position_ids, words)  # [T, H]
        seeds = self._seeds(x)
        for i, layer in enumerate(self.layers):
            layer_seeds = seeds[SEEDS_PER_LAYER * i : SEEDS_PER_LAYER * (i + 1)]
            arguments = x, cu_seqlens, max_seqlen, layer_seeds, rows if i == len(self.layers) - 1 else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Masks are functions of the seeds. Without seeds, PyTorch's dropout needs the generator's state again.
                uses_generator = self.training and self.has_dropout and layer_seeds[0] is None
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=uses_generator)
            else:
                x = layer(*arguments)  # [T, H], or [R, H] after the last layer
        return x

    def _seeds(self, x: Tensor) -> Sequence[Tensor | None]:
        """One dropout seed for each operator of the forward, drawn from torch's generator at once on the device."""
        n = SEEDS_PER_LAYER * len(self.layers)
        if not (self.training and self.has_dropout) or choose_backend(x) == "reference":
            return (None,) * n  # no dropout, or PyTorch's own
        return torch.randint(0, 2**62, (n,), dtype=torch.int64, device=x.device).split(1)
