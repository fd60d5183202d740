"""Encoded texts to packed batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...model.batch import IGNORE
from ...model.text_batch import TextBatch
from .tokens import EncodedText


def token_budget(lengths: Sequence[int], tokens: int) -> list[np.ndarray]:
    """Groups of texts of similar length with at most ``tokens`` tokens each; a longer text is a group of its own.

    Args:
        lengths: of each text.

    Returns:
        The numbers of each group's texts, longest texts first, so that too large a budget fails at once.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    groups, start, used = [], 0, 0
    for i, number in enumerate(order):
        if used and used + lengths[number] > tokens:
            groups.append(order[start:i])
            start, used = i, 0
        used += lengths[number]
    return [*groups, order[start:]] if len(order) else []


def pack_texts(
    texts: Sequence[EncodedText],
    labels: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    tokens: int | None = None,
    segments: int | None = None,
) -> TextBatch:
    """One batch of ``texts`` in their order.

    Args:
        labels: as in `TextBatch`, for these texts; None: none has a label.
        max_seqlen: the batch's; None: the length of the longest text.
        tokens: T, with slack after the texts; None: as many as there are.
        segments: S, those of the slack included; None: as many as there are.

    Raises:
        ValueError: the texts do not fit into ``tokens`` and ``segments``.
    """
    lengths = [len(text) for text in texts]
    longest = max(lengths) if max_seqlen is None else max_seqlen
    used = sum(lengths)
    total = used if tokens is None else tokens
    slack = total - used
    lengths += [longest] * (slack // longest) + ([slack % longest] if slack % longest else [])
    count = len(lengths) if segments is None else segments
    if slack < 0 or count < len(lengths):
        raise ValueError(f"{len(texts)} texts of {used} tokens do not fit into {tokens} tokens and {segments} segments")
    bounds = np.zeros(count + 1, dtype=np.int64)
    np.cumsum([*lengths, *[0] * (count - len(lengths))], out=bounds[1:])
    empty = np.zeros(slack, dtype=np.int64)
    given = torch.full((len(texts),), IGNORE) if labels is None else labels
    spare = (count - len(texts), *given.shape[1:])
    none = torch.full(spare, float("nan") if given.is_floating_point() else IGNORE, dtype=given.dtype)
    return TextBatch(
        input_ids=torch.from_numpy(np.concatenate([*(text.ids for text in texts), empty])),
        token_type_ids=torch.from_numpy(np.concatenate([*(text.types for text in texts), empty])),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        labels=torch.cat([given, none]),
        max_seqlen=longest,
        num_tokens=used,
        num_labels=0 if labels is None else len(texts),
    )
