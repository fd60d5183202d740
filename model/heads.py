"""Models for tasks on packed texts: embeddings, one label a text, one label a token, an answer in a text.

    SentenceEncoder      a vector a text: mean, max or first token of the hidden states, or the pooler's output
    CachedGradientEncoder    … trained by the gradient of its vectors
    SequenceClassifier   first token → linear → activation → dropout → linear → C outputs, as in Transformers'
                         BertForSequenceClassification and its relatives
    TokenClassifier      every token → dropout → linear → C outputs, as in BertForTokenClassification
    SpanPredictor        every token → dropout → linear → start and end, as in BertForQuestionAnswering

The sequence classifier's last layer computes only the rows that its head reads, the first tokens. Losses are sums over
the labels, so that the mean over several batches is exact.

Shapes: T tokens, S segments, H hidden_size, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import IGNORE
from .config import BertConfig
from .encoder import BertEncoder, ReadRows, initialise
from .text_batch import TextBatch

POOLINGS = ("mean", "cls", "max", "pooler")
# Transformers' names for what a classification head's outputs are.
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (SINGLE, MULTI, REGRESSION)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}


class SentenceEncoder(nn.Module):
    """An encoder and a pooling: packed texts → one vector a text.

    Args:
        pooling: "mean" or "max" over all tokens, special ones included; "cls", the first token; "pooler",
            tanh(W x + b) of the first token.
        embedding_size: as of `BertEncoder`.

    Raises:
        ValueError: ``pooling`` has another value.
    """

    def __init__(self, config: BertConfig, pooling: str = "mean", embedding_size: int | None = None) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
        self.config = config
        self.pooling = pooling
        self.encoder = BertEncoder(config, embedding_size)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooling == "pooler" else None
        initialise(self, config)

    def forward(self, batch: TextBatch) -> Tensor:
        """See `vectors`."""
        return self.vectors(batch)

    def vectors(self, batch: TextBatch) -> Tensor:
        """float32 [S, H], or float64 of a model in it. The rows of empty segments are undefined."""
        if self.pooling in ("cls", "pooler"):
            first = first_tokens(self.encoder, batch)  # [S, H]
            return _accurate(first if self.pooler is None else torch.tanh(self.pooler(first)))
        hidden = all_tokens(self.encoder, batch)  # [T, H]
        # unsafe: else the offsets are checked on the host, which waits for the device.
        return torch.segment_reduce(_accurate(hidden), self.pooling, offsets=batch.cu_seqlens.long(), unsafe=True)


class ClassifierOutput(NamedTuple):
    """Sums over the labelled texts, or tokens, of a batch: 0-dim tensors on the model's device.

    Attributes:
        loss_sum: cross entropy; binary cross entropy, averaged over the classes; or squared error.
        correct: int64, the number of texts for which every output is right; 0 in a regression.
    """

    loss_sum: Tensor
    correct: Tensor


class CachedGradientEncoder(SentenceEncoder):
    """A `SentenceEncoder` that is trained by the gradient of a loss with respect to its vectors (Gao et al. 2021).

    The loss compares the texts of several micro-batches: its gradient is known once all their vectors are.
    A backward of Σ vector · gradient, micro-batch by micro-batch, then gives the loss's gradient.

    Attributes:
        gradient: computes the gradient from a batch's vectors, where the batch does not bring it.
    """

    gradient: Callable[[Tensor], Tensor] | None = None

    def forward(self, batch: TextBatch) -> ClassifierOutput:  # type: ignore[override]
        """Σ vector · gradient, with the gradient in ``batch.labels`` if they are [S, H]; 0 right predictions."""
        vectors = self.vectors(batch)  # [S, H]
        gradient = batch.labels if self.gradient is None else self.gradient(vectors.detach())
        return ClassifierOutput((vectors * gradient).sum(), torch.zeros((), device=vectors.device))


class SequenceClassifier(nn.Module):
    """An encoder and a classification head, on packed texts.

    Args:
        num_outputs: C, the number of classes; 1 in a regression.
        problem: one of `PROBLEMS`.
        activation: of the head, a key of `ACTIVATIONS`.
        head_dropout: probability in the head; None: the configuration's ``hidden_dropout_prob``.
        input_dropout: the head drops its input too (RoBERTa, ELECTRA).
        class_weights: C factors of the classes' losses; None: 1. Only with a single label a text.
        embedding_size: as of `BertEncoder`.

    Raises:
        ValueError: an argument is not allowed.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        config: BertConfig,
        num_outputs: int,
        problem: str = SINGLE,
        *,
        activation: str = "tanh",
        head_dropout: float | None = None,
        input_dropout: bool = False,
        class_weights: Sequence[float] | None = None,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        if problem not in PROBLEMS:
            raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}; got {problem!r}")
        if num_outputs < 1 or (problem == REGRESSION and num_outputs != 1):
            raise ValueError(f"num_outputs must be positive, and 1 in a regression; got {num_outputs}")
        if class_weights is not None and (problem != SINGLE or len(class_weights) != num_outputs):
            raise ValueError(f"class_weights must be {num_outputs} numbers, with a single label a text")
        self.config = config
        self.problem = problem
        self.encoder = BertEncoder(config, embedding_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, num_outputs)
        self.activation = ACTIVATIONS[activation]
        self.head_dropout = config.hidden_dropout_prob if head_dropout is None else head_dropout
        self.input_dropout = input_dropout
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        initialise(self, config)

    def features(self, batch: TextBatch) -> Tensor:
        """[S, H], what the last linear reads. The rows of slack and of empty segments mean nothing."""
        x = first_tokens(self.encoder, batch)  # [S, H]
        if self.input_dropout:
            x = F.dropout(x, self.head_dropout, self.training)
        return self.activation(self.dense(x))

    def logits(self, batch: TextBatch) -> Tensor:
        """float32 [S, C]. The rows of slack and of empty segments mean nothing."""
        x = self.features(batch)
        return self.out(F.dropout(x, self.head_dropout, self.training)).float()

    def forward(self, batch: TextBatch) -> ClassifierOutput:
        """Loss and number of right predictions over the labelled texts."""
        logits, labels = self.logits(batch), batch.labels
        if self.problem == SINGLE:
            loss = F.cross_entropy(logits, labels, self.class_weights, ignore_index=IGNORE, reduction="sum")
            return ClassifierOutput(loss, (logits.argmax(-1) == labels).sum())
        if self.problem == REGRESSION:
            errors = logits.squeeze(-1) - labels  # [S]
            loss = torch.where(labels.isnan(), 0.0, errors).square().sum()
            return ClassifierOutput(loss, torch.zeros((), dtype=torch.int64, device=loss.device))
        labelled = ~labels[:, 0].isnan()  # [S]
        losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none").mean(-1)  # [S]
        right = ((logits > 0.0) == (labels > 0.5)).all(-1)
        return ClassifierOutput(torch.where(labelled, losses, 0.0).sum(), (right & labelled).sum())


def _accurate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def first_tokens(encoder: BertEncoder, batch: TextBatch) -> Tensor:
    """The hidden states of each segment's first token, [S, H]; undefined for empty segments, which must come last."""
    starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
    filled = torch.cumsum(ends > starts, 0, dtype=torch.int32)  # [S]
    rows = ReadRows(starts.long().clamp(max=batch.input_ids.shape[0] - 1), F.pad(filled, (1, 0)))
    return encoder(batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, rows)


class TokenClassifier(nn.Module):
    """An encoder and a linear on each token, on packed texts.

    Args:
        num_outputs: C, the number of classes.
        head_dropout: probability before the linear; None: the configuration's ``hidden_dropout_prob``.
        embedding_size: as of `BertEncoder`.
    """

    def __init__(
        self,
        config: BertConfig,
        num_outputs: int,
        *,
        head_dropout: float | None = None,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = BertEncoder(config, embedding_size)
        self.tag_out = nn.Linear(config.hidden_size, num_outputs)
        self.head_dropout = config.hidden_dropout_prob if head_dropout is None else head_dropout
        initialise(self, config)

    def logits(self, batch: TextBatch) -> Tensor:
        """float32 [T, C]. The rows of the slack mean nothing."""
        x = all_tokens(self.encoder, batch)  # [T, H]
        return self.tag_out(F.dropout(x, self.head_dropout, self.training)).float()

    def forward(self, batch: TextBatch) -> ClassifierOutput:
        """Cross entropy and number of right classes, summed over the labelled tokens; ``batch.labels``: int64 [T]."""
        logits, labels = self.logits(batch), batch.labels
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return ClassifierOutput(loss, (logits.argmax(-1) == labels).sum())


class SpanPredictor(nn.Module):
    """An encoder and two scores a token, of a span that starts and of one that ends there, on packed texts.

    Args:
        head_dropout: probability before the linear.
        embedding_size: as of `BertEncoder`.

    Attributes:
        null_threshold: a text answers nothing if the score of no answer is above the best answer's by more than this.
    """

    def __init__(self, config: BertConfig, *, head_dropout: float = 0.0, embedding_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = BertEncoder(config, embedding_size)
        self.span_out = nn.Linear(config.hidden_size, 2)
        self.head_dropout = head_dropout
        self.null_threshold = 0.0
        initialise(self, config)

    def logits(self, batch: TextBatch) -> Tensor:
        """float32 [T, 2], start and end. The rows of the slack mean nothing."""
        x = all_tokens(self.encoder, batch)  # [T, H]
        return self.span_out(F.dropout(x, self.head_dropout, self.training)).float()

    def forward(self, batch: TextBatch) -> ClassifierOutput:
        """See `span_loss`; ``batch.labels``: int64 [S, 2]."""
        return span_loss(self.logits(batch), batch)


def span_loss(logits: Tensor, batch: TextBatch) -> ClassifierOutput:
    """The mean of start's and end's cross entropy over each segment's own tokens, summed over the labelled segments.

    A segment counts as right if start and end both are. There is no scatter: the gradient is deterministic.

    Args:
        logits: float32 [T, 2].
        batch: with labels int64 [S, 2], the first and the last token of the answer, counted from the segment's start.
    """
    offsets = batch.cu_seqlens.long()  # [S + 1]
    positions = torch.arange(logits.shape[0], device=logits.device)  # [T]
    segments = torch.bucketize(positions, offsets[1:], right=True)  # [T]
    # unsafe: else the offsets are checked on the host, which waits for the device.
    largest = torch.segment_reduce(logits.detach(), "max", offsets=offsets, unsafe=True)  # [S, 2]; −∞ if empty
    powers = (logits - largest[segments]).exp()  # [T, 2]
    total = torch.segment_reduce(powers, "sum", offsets=offsets, unsafe=True)  # [S, 2]
    is_answer = (positions - offsets[segments])[:, None] == batch.labels[segments]  # [T, 2]
    answer = torch.segment_reduce(torch.where(is_answer, logits, 0.0), "sum", offsets=offsets, unsafe=True)  # [S, 2]
    labelled = batch.labels[:, 0] >= 0  # [S]
    filled = torch.where(labelled[:, None], largest, 0.0)
    losses = total.clamp(min=torch.finfo(total.dtype).tiny).log() + filled - answer  # [S, 2]
    right = (answer.detach() == largest).all(-1) & labelled
    return ClassifierOutput(torch.where(labelled, losses.mean(-1), 0.0).sum(), right.sum())


def all_tokens(encoder: BertEncoder, batch: TextBatch) -> Tensor:
    """The hidden states of every token, [T, H]."""
    return encoder(batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
