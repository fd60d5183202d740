"""BERT for pretraining: the encoder, the masked-language-model head, the pooler and next-sentence head, both losses.

    MLM   hidden rows at the masked positions → LN(GELU(W x + b)) → logits over the vocabulary, decoder tied to the
          word embeddings; −Σ log p(original token)
    NSP   first token of each segment → tanh(W x + b) → 2 logits; −Σ log p(label), 0 = B follows A

The losses are sums, so that the mean over several micro-batches and ranks is exact: divide by the sums of the batches'
counts (`PackedBatch.num_masked`, `.num_pairs`). The last layer computes only the rows that the heads read, the masked
positions and the first tokens.

Shapes: T tokens, S segments, M masked positions, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import FusedLayerNorm, FusedLinearGELU, masked_lm_loss
from ..kernels.backend import choose_backend
from .batch import IGNORE, PackedBatch
from .config import BertConfig
from .encoder import BertEncoder, ReadRows, initialise
from .tied_embedding import tied_rows


class PreTrainingOutput(NamedTuple):
    """Sums over the labelled positions and pairs of a batch: 0-dim tensors on the model's device.

    Attributes:
        mlm_loss_sum: −Σ log p(original token), nats.
        nsp_loss_sum: −Σ log p(pair label), nats; 0 in a batch without pairs.
        mlm_correct: int64, number of masked positions where the original token has the largest logit.
        nsp_correct: int64, number of pairs where the label has the larger logit.
    """

    mlm_loss_sum: Tensor
    nsp_loss_sum: Tensor
    mlm_correct: Tensor
    nsp_correct: Tensor


class BertForPreTraining(nn.Module):
    """BERT with its two pretraining heads, on packed batches.

    Initialised like BERT, from torch's generator: weights and embeddings normal(0, initializer_range), biases 0,
    LayerNorms 1 and 0, the padding token's embedding 0.

    Args:
        embedding_size: as of `BertEncoder`; the decoder, which is tied to the embeddings, has this width too.

    Attributes:
        z_loss: in training mode the masked-LM loss has this weight of lse² added, see `masked_lm_loss`.
    """

    def __init__(self, config: BertConfig, embedding_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.z_loss = 0.0
        self.encoder = BertEncoder(config, embedding_size)
        width = config.hidden_size if embedding_size is None else embedding_size
        self.mlm_dense = FusedLinearGELU(config.hidden_size, width)
        self.mlm_norm = FusedLayerNorm(width, eps=config.layer_norm_eps)
        self.mlm_bias = nn.Parameter(torch.empty(config.vocab_size))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.nsp_classifier = nn.Linear(config.hidden_size, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter again."""
        initialise(self, self.config)
        nn.init.zeros_(self.mlm_bias)

    def num_parameters(self) -> int:
        """Number of trainable scalars; the tied decoder counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, batch: PackedBatch) -> PreTrainingOutput:
        """Both losses and both counts of correct predictions over ``batch``, as sums."""
        words, decoder_weight = self._words(batch.input_ids)  # [T, H] or None, [V, H]
        hidden = self._read_hidden(batch, words)  # [M + S, H]
        masked, first = hidden.split([batch.masked_positions.shape[0], batch.nsp_labels.shape[0]])  # [M, H], [S, H]
        mlm_loss, mlm_correct = masked_lm_loss(
            self.transform(masked),
            decoder_weight.to(hidden.dtype),
            self.mlm_bias,
            batch.masked_labels,
            ignore_index=IGNORE,
            reduction="sum",
            return_accuracy=True,
            z_loss=self.z_loss if self.training else 0.0,
        )
        nsp_logits = self.nsp_logits(self.pool(first))  # [S, 2]
        nsp_logits = nsp_logits.to(torch.promote_types(nsp_logits.dtype, torch.float32))
        nsp_loss = F.cross_entropy(nsp_logits, batch.nsp_labels, ignore_index=IGNORE, reduction="sum")
        nsp_correct = (nsp_logits.argmax(-1) == batch.nsp_labels).sum()
        return PreTrainingOutput(mlm_loss, nsp_loss, mlm_correct, nsp_correct)

    def encode(self, batch: PackedBatch) -> Tensor:
        """The hidden states of all tokens after the last layer: [T, H]."""
        return self.encoder(
            batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
        )

    def _words(self, input_ids: Tensor) -> tuple[Tensor | None, Tensor]:
        """The tokens' word embeddings, [T, H], or None if the encoder must look them up; the decoder's weight, [V, H].

        `tied_rows` saves time in an eager backward on a CPU. On a GPU its sum of rows is not deterministic.
        """
        weight = self.decoder_weight
        backward = torch.is_grad_enabled() and weight.requires_grad
        if not backward or torch.compiler.is_compiling() or weight.is_cuda or choose_backend(weight) == "triton":
            return None, weight
        return tied_rows(weight, input_ids, self.encoder.embeddings.word_embeddings.padding_idx)

    def _read_hidden(self, batch: PackedBatch, words: Tensor | None) -> Tensor:
        """[M + S, H]: the hidden states of the masked positions, then of each segment's first token.

        The rows of spare positions and of empty segments are undefined; they have no label.
        """
        cu_seqlens, num_rows = batch.cu_seqlens, batch.input_ids.shape[0]
        # Position T, sorted to the end, stands for "not read".
        masked = torch.where(batch.masked_labels != IGNORE, batch.masked_positions, num_rows)  # [M]
        first = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], num_rows)  # [S]
        positions, order = torch.sort(torch.cat([masked, first.long()]), stable=True)  # [M + S]
        bounds = torch.searchsorted(positions, cu_seqlens.long()).to(torch.int32)  # [S + 1]
        rows = ReadRows(positions.clamp(max=num_rows - 1), bounds)
        hidden = self.encoder(  # [M + S, H]
            batch.input_ids, batch.token_type_ids, batch.position_ids, cu_seqlens, batch.max_seqlen, rows, words
        )
        return hidden.index_select(0, torch.argsort(order))

    @property
    def decoder_weight(self) -> Tensor:
        """The MLM decoder, [V, H]: the word embeddings themselves."""
        return self.encoder.embeddings.word_embeddings.weight

    def transform(self, hidden: Tensor) -> Tensor:
        """The MLM head before the decoder, LN(GELU(W x + b)): [.., H] → [.., E]."""
        return self.mlm_norm(self.mlm_dense(hidden))

    def predict_tokens(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary: hidden states [.., H] → [.., V]."""
        return F.linear(self.transform(hidden), self.decoder_weight, self.mlm_bias)

    def pool(self, first: Tensor) -> Tensor:
        """tanh(W x + b) of the hidden states of the segments' first tokens: [.., H] → [.., H]."""
        return torch.tanh(self.pooler(first))

    def nsp_logits(self, pooled: Tensor) -> Tensor:
        """[.., H] → [.., 2]: (B follows A, B does not)."""
        return self.nsp_classifier(pooled)
