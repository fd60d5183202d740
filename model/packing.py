"""The packed batch: sequences end to end in one token axis, no padding between them, every shape constant.

A batch of a run always has T token slots, S segment slots and M masked-position slots. Segments that do not exist
are empty (their bounds repeat); token slots left over at the end form a segment of their own that is attended to by
nobody else, carries no label and counts as no token; spare masked positions point at token 0 with label −100.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

IGNORE = -100


@dataclasses.dataclass
class PackedBatch:
    """One micro-batch, as the model takes it.

    Attributes:
        input_ids: int64 [T], corrupted tokens ([MASK] and the rest).
        token_type_ids: int64 [T], 0 for sentence A, 1 for B.
        position_ids: int64 [T], from 0 in each segment.
        cu_seqlens: int32 [S + 1], segment s is cu_seqlens[s] … cu_seqlens[s + 1] − 1; the last entry is T.
        masked_positions: int64 [M], rows of the token axis to predict.
        masked_labels: int64 [M], the original tokens there; −100 in spare slots.
        nsp_labels: int64 [S], 0 = B follows A, 1 = it does not (Transformers' order); −100 where there is no pair.
        max_seqlen: no segment, slack included, is longer. Constant over a run.
        num_tokens: real tokens (without the slack).
        num_masked: labels in masked_labels that are not −100.
        num_pairs: labels in nsp_labels that are not −100.
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

    def _map(self, fn) -> PackedBatch:  # type: ignore[no-untyped-def]
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return PackedBatch(**{name: fn(x) if isinstance(x, Tensor) else x for name, x in changed.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with its tensors on ``device`` (``non_blocking`` as in ``Tensor.to``)."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; the name is the one ``DataLoader(pin_memory=True)`` looks for."""
        return self._map(Tensor.pin_memory)
