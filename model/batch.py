"""The packed batch: sequences end to end on one token axis, without padding, in constant shapes.

All batches of a run have T token slots, S segment slots and M masked-position slots. Unused segments are empty (their
bounds repeat). Unused token slots at the end form one more segment, the slack: it has no label and does not count as
tokens. Unused masked positions point at token 0 with label −100.

`pack_padded` and `to_padded` convert from and to Transformers' padded [B, N] tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

IGNORE = -100  # the label of positions and pairs without a loss, as in PyTorch's cross_entropy


class Batch(Protocol):
    """What a training step needs of a dataclass of tensors and counts.

    Attributes:
        input_ids: int64 [T].
        max_seqlen: upper bound of the segments' lengths. Constant over a run.
        label_counts: the denominator of each loss.
    """

    input_ids: Tensor
    max_seqlen: int

    @property
    def label_counts(self) -> tuple[int, ...]: ...

    def map(self, fn: Callable[[Tensor], Tensor]) -> Any: ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...


Fields = TypeVar("Fields")


def map_tensors(batch: Fields, fn: Callable[[Tensor], Tensor]) -> Fields:
    """The dataclass ``batch`` with ``fn`` applied to each of its tensors."""
    values = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))  # type: ignore[arg-type]
    changes: dict[str, Any] = {name: fn(value) for name, value in values if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **changes)  # type: ignore[type-var]


@dataclasses.dataclass
class PackedBatch:
    """One micro-batch, the model's input.

    Attributes:
        input_ids: int64 [T], corrupted tokens.
        token_type_ids: int64 [T], 0 for sentence A, 1 for B.
        position_ids: int64 [T], from 0 in each segment.
        cu_seqlens: int32 [S + 1], segment s is cu_seqlens[s] … cu_seqlens[s + 1] − 1; the last entry is T.
        masked_positions: int64 [M], rows of the token axis to predict.
        masked_labels: int64 [M], the original tokens there; −100 in unused slots.
        nsp_labels: int64 [S], 0 = B follows A, 1 = it does not (Transformers' order); −100 where there is no pair.
        max_seqlen: upper bound of the lengths of segments and slack. Constant over a run.
        num_tokens: number of tokens, without the slack.
        num_masked: number of masked_labels that are not −100.
        num_pairs: number of nsp_labels that are not −100.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: the shapes do not fit together. Values are not checked: they may be on a GPU.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    masked_positions: Tensor
    masked_labels: Tensor
    nsp_labels: Tensor
    max_seqlen: int
    num_tokens: int
    num_masked: int
    num_pairs: int

    def __post_init__(self) -> None:
        for name, like in (
            ("input_ids", "input_ids"),
            ("token_type_ids", "input_ids"),
            ("position_ids", "input_ids"),
            ("cu_seqlens", "cu_seqlens"),
            ("masked_positions", "masked_positions"),
            ("masked_labels", "masked_positions"),
            ("nsp_labels", "nsp_labels"),
        ):
            tensor, shape = getattr(self, name), getattr(self, like).shape
            dtype = torch.int32 if name == "cu_seqlens" else torch.int64
            if tensor.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}")
            if tensor.ndim != 1 or tensor.shape != shape:
                raise ValueError(f"{name} must have one axis, as long as {like}'s; got shape {tuple(tensor.shape)}")
        if self.cu_seqlens.shape[0] != self.nsp_labels.shape[0] + 1:
            raise ValueError(
                f"cu_seqlens must have one entry more than nsp_labels; got {self.cu_seqlens.shape[0]} and "
                f"{self.nsp_labels.shape[0]} entries"
            )

    @property
    def label_counts(self) -> tuple[int, ...]:
        """The denominators of the masked-LM and the next-sentence loss."""
        return self.num_masked, self.num_pairs

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The batch with ``fn`` applied to each of its tensors."""
        return map_tensors(self, fn)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with its tensors on ``device`` (``non_blocking`` as in ``Tensor.to``)."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))


def pack_padded(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    labels: Tensor | None = None,
    next_sentence_label: Tensor | None = None,
) -> PackedBatch:
    """Pack padded examples, the inputs of Transformers' ``BertForPreTraining``.

    The batch has no slack and no unused slots, so its shapes depend on the data. Synchronises with the device.

    Args:
        input_ids: int64 [B, N].
        attention_mask: [B, N], in each row ones on tokens, then zeros on padding; None: no padding.
        token_type_ids: int64 [B, N]; None: zeros.
        labels: int64 [B, N], the original token at each position to predict, −100 elsewhere; None: nothing to predict.
        next_sentence_label: int64 [B], 0 = B follows A, 1 = it does not, −100 = no pair; None: no pairs.

    Raises:
        ValueError: a shape does not fit ``input_ids``, padding comes before a token, or padding has a label.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [B, N] and not empty; got shape {tuple(input_ids.shape)}")
    for name, tensor, shape in (
        ("attention_mask", attention_mask, input_ids.shape),
        ("token_type_ids", token_type_ids, input_ids.shape),
        ("labels", labels, input_ids.shape),
        ("next_sentence_label", next_sentence_label, input_ids.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit input_ids; got shape {tuple(tensor.shape)}")

    rows, columns = input_ids.shape
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = real.sum(1)  # [B]
    position_ids = torch.arange(columns, device=input_ids.device).expand(rows, columns)  # [B, N]
    if not bool(((position_ids < lengths[:, None]) == real).all()) or not bool(lengths.all()):
        raise ValueError(
            "attention_mask must be one or more ones, then zeros, in every row: pad the examples on the right"
        )
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    if labels is None:
        labels = torch.full_like(input_ids, IGNORE)
    if bool((labels[~real] != IGNORE).any()):
        raise ValueError(f"labels must be {IGNORE} wherever attention_mask is 0; got a label on padding")
    if next_sentence_label is None:
        next_sentence_label = torch.full_like(lengths, IGNORE)

    packed_labels = labels[real]  # [T]
    masked_positions = torch.nonzero(packed_labels != IGNORE).squeeze(1)  # [M]
    return PackedBatch(
        input_ids=input_ids[real],
        token_type_ids=token_type_ids[real],
        position_ids=position_ids[real],
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        masked_positions=masked_positions,
        masked_labels=packed_labels[masked_positions],
        nsp_labels=next_sentence_label,
        max_seqlen=int(lengths.max()),
        num_tokens=int(lengths.sum()),
        num_masked=masked_positions.shape[0],
        num_pairs=int((next_sentence_label != IGNORE).sum()),
    )


def to_padded(batch: PackedBatch, pad_token_id: int = 0) -> dict[str, Tensor]:
    """The batch as the keyword arguments of Transformers' ``BertForPreTraining.forward``.

    Slack, empty segments and unused slots are omitted: B is the number of other segments, N the longest length.
    Synchronises with the device.

    Returns:
        On the batch's device: ``input_ids``, ``token_type_ids``, ``attention_mask`` and ``labels``, int64 [B, N], with
        ``pad_token_id``, 0, 0 and −100 on padding; ``next_sentence_label``, int64 [B].

    Raises:
        ValueError: the batch has no tokens besides slack.
    """
    starts, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    segments = torch.nonzero((starts < ends) & (ends <= batch.num_tokens)).squeeze(1)  # [B]
    if segments.shape[0] == 0:
        raise ValueError("the batch has no tokens besides slack: there is nothing to pad")
    starts, lengths = starts[segments], (ends - starts)[segments]
    columns = torch.arange(int(lengths.max()), device=starts.device)
    real = columns < lengths[:, None]  # [B, N]
    index = (starts[:, None] + columns)[real]  # [number of tokens]

    token_labels = torch.full_like(batch.input_ids, IGNORE)  # [T]
    labelled = batch.masked_labels != IGNORE
    token_labels[batch.masked_positions[labelled]] = batch.masked_labels[labelled]

    def padded(packed: Tensor, fill: int) -> Tensor:
        return torch.full(real.shape, fill, dtype=torch.int64, device=starts.device).masked_scatter(real, packed[index])

    return {
        "input_ids": padded(batch.input_ids, pad_token_id),
        "attention_mask": real.long(),
        "token_type_ids": padded(batch.token_type_ids, 0),
        "labels": padded(token_labels, IGNORE),
        "next_sentence_label": batch.nsp_labels[segments],
    }
