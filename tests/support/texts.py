"""Packed texts without a tokenizer."""

from __future__ import annotations

import torch

from fusebert.model.batch import IGNORE
from fusebert.model.text_batch import TextBatch


def text_batch(padded: dict[str, torch.Tensor], labels: torch.Tensor | None = None, empty: int = 0) -> TextBatch:
    """The padded batch of a Transformers model, packed; ``empty`` empty segments at the end."""
    real = padded["attention_mask"].bool()
    lengths = real.sum(1)
    positions = torch.arange(real.shape[1]).expand(real.shape)
    types = padded.get("token_type_ids", torch.zeros_like(padded["input_ids"]))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    bounds = torch.cat([bounds, bounds[-1:].expand(empty)])
    given = torch.full((len(lengths),), IGNORE) if labels is None else labels
    fill = torch.full((empty, *given.shape[1:]), IGNORE if given.dtype == torch.int64 else float("nan")).to(given.dtype)
    return TextBatch(
        input_ids=padded["input_ids"][real],
        token_type_ids=types[real],
        position_ids=positions[real],
        cu_seqlens=bounds.to(torch.int32),
        labels=torch.cat([given, fill]),
        max_seqlen=int(lengths.max()),
        num_tokens=int(lengths.sum()),
        num_labels=len(lengths),
    )
